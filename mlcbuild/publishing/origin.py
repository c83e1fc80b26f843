"""What a model was made of: repository and commit of its base, and the licence that comes along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LICENCE_FILES = re.compile(r"(LICEN[CS]E|NOTICE|USE[_-]POLICY|COPYING)[^/]*", re.IGNORECASE)
_LICENCE_FIELDS = ("license", "license_name", "license_link")
_CARRIED = ("language",)  # other facts of a model card that hold for the quantized model too


@dataclass(frozen=True)
class Origin:
    """`repositories` by name with their commits, the model's own first; empty for a local folder. `licence` holds the
    card's own fields; `files` are licence texts to be published with the weights."""

    repositories: Mapping[str, str] = field(default_factory=dict)
    licence: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def of_folder(folder: Path) -> Origin:
    """Of a local checkpoint, as far as it says: README.md's head and licence texts."""
    card = front_matter(
        (folder / "README.md").read_text("utf-8", "replace") if (folder / "README.md").is_file() else ""
    )
    texts = sorted(path for path in folder.iterdir() if path.is_file() and LICENCE_FILES.fullmatch(path.name))
    return Origin({}, *facts(card), {path.name: path.read_bytes() for path in texts})


def of_gguf(said: Mapping[str, Any]) -> Origin:
    """Of a GGUF file that is here, by the facts in its header (ggml-org/ggml docs/gguf.md): its folder is anyone's."""
    names = {"license": "license", "license.name": "license_name", "license.link": "license_link"}
    card = {ours: said[f"general.{key}"] for key, ours in names.items() if isinstance(said.get(f"general.{key}"), str)}
    languages = said.get("general.languages")
    return Origin({}, *facts({**card, "language": languages if isinstance(languages, list) else None}))


def of_hub(repositories: Mapping[str, str]) -> Origin:
    """Of repositories on the hub at these commits; the licence is the first one's. Raises what huggingface_hub does."""
    from huggingface_hub import HfApi, hf_hub_download

    name, commit = next(iter(repositories.items()))
    info = HfApi().model_info(name, revision=commit)
    card = info.card_data.to_dict() if info.card_data else {}
    texts = sorted(each.rfilename for each in info.siblings or () if LICENCE_FILES.fullmatch(each.rfilename))
    files = {text: Path(hf_hub_download(name, text, revision=commit)).read_bytes() for text in texts}
    return Origin(repositories, *facts(card), files)


def facts(card: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A card's licence, and what else of it is carried over."""
    licence = {name: card[name] for name in _LICENCE_FIELDS if card.get(name)}
    return licence, {name: card[name] for name in _CARRIED if card.get(name)}


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between two lines of `---` at the head of a model card; nothing where there is none."""
    import yaml

    found = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        data = {}
    return data if isinstance(data, dict) else {}
