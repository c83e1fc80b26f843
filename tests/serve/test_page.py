"""The server's page in a real browser: a key is asked for, a question typed, the answer read."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

import pytest

from mlcbuild.compiler.web.try_out.page import chat_page
from tests.serve.conftest import KEY
from tests.support.chromium import browser
from tests.support.tools import missing


@pytest.mark.slow
def test_a_person_talks_to_a_package(address: str, tmp_path: Path) -> None:
    if shutil.which("chromium") is None:
        missing("chromium")
    with browser(tmp_path / "profile") as page:
        page.open(f"{address}/health")
        # The page asks for the key in a dialog, which waits for a person: its answer is given before.
        script = f"prompt = () => {KEY!r}"
        page._call("Page.addScriptToEvaluateOnNewDocument", {"source": script})
        page._call("Page.enable", {})
        page.open(address)
        page.until("!document.querySelector('input').disabled", 30)
        assert page.texts("option") == ["tiny-cpu"]
        for turn, question in enumerate(("Hi", "Sea"), 1):
            page.evaluate("document.querySelector('input').focus()")
            page.type(question)
            page.until(
                f"document.querySelectorAll('.model').length == {turn} && !/Stop/.test(document.body.innerText)", 30
            )
        assert page.texts(".you") == ["Hi", "Sea"]
        assert "tokens, " in page.texts("#status")[0] or page.texts(".model")[-1] == ""
        page.evaluate("document.querySelector('#reset').click()")
        assert page.texts("#talk") == [""]


def test_the_page_in_a_package_has_the_same_looks(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        pages = [answer.read().decode(), chat_page("m", "m-MLC", "m.wasm")]
    styles = {page.partition("<style>")[2].partition("</style>")[0] for page in pages}
    assert len(styles) == 1 and "prefers-color-scheme: dark" in styles.pop()
    assert not any("$" in page.partition("<script")[0] for page in pages), "a name that nothing was put in the place of"
