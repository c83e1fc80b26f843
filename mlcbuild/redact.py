"""What nobody should read, taken out of texts that are shown, logged, reported or published.

One rule for all of them: the values of environment variables that are called keys, tokens, passwords and the like; the
user's token for the hub, wherever it comes from; what a URL carries before its host and after its path.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

HIDDEN = "[hidden]"
# GIT_AUTHOR_NAME, TOKENIZERS_PARALLELISM, MAX_TOKENS, PWD and OLDPWD are none.
_SECRET = re.compile(
    r"KEY|TOKEN(?!IZER|S$)|SECRET|PASSW|PASSPHRASE|_PWD$|_PASS$|_SAS$|SIGNATURE|CREDENTIAL|CONN(ECTION)?_?STR|AUTH(?!OR)",
    re.IGNORECASE,
)
_SHORTEST = 6  # characters: a shorter value would blot out half of the text
_USERINFO = re.compile(r"(\w://)[^\s/?#\"']+@")
_QUERY = re.compile(r"(\w://[^\s?\"']+)\?[^\s\"']*")


def redact(text: str, *more: str) -> str:
    """`text` with `[hidden]` in place of each secret, those in `more` too, and `?…` in place of each URL's query."""
    return redactor(*more)(text)


def redactor(*more: str) -> Callable[[str], str]:
    """`redact` for many texts: what is secret is found out once."""
    named = {value for name, value in os.environ.items() if _SECRET.search(name)}
    pairs = (pair.partition("=") for value in named for pair in value.split(";"))  # of a connection string
    parts = {value for name, _, value in pairs if value and _SECRET.search(name)}
    known = {value for value in {*named, *parts, *more, _hub_token()} if len(value) >= _SHORTEST}
    secrets = sorted(known, key=len, reverse=True)  # one may lie within another

    def redact(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return _QUERY.sub(r"\1?…", _USERINFO.sub(rf"\1{HIDDEN}@", text)) if "://" in text else text

    return redact


def _hub_token() -> str:
    """The hub's library knows it; where nothing has loaded that, the file is looked at that it would read."""
    library = sys.modules.get("huggingface_hub")
    if library is not None:
        return library.get_token() or ""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    try:
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser().read_text().strip()
    except (OSError, ValueError, RuntimeError):
        return ""
