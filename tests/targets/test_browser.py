"""A webgpu package in WebLLM in headless Chromium, against our CPU library; and its page, used by hand."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cache import layout
from mlcbuild.compiler.web import emscripten
from mlcbuild.compiler.web.try_out.page import chat_page
from mlcbuild.runtime import load
from tests.support.chromium import Page, browser, served
from tests.support.tools import missing

ROOT = Path(__file__).parents[2]
WEBLLM = "MLCBUILD_TEST_WEBLLM"  # a node_modules folder with @mlc-ai/web-llm
PROMPT, TOKENS = "Once upon a time", 16
# Greedy by a tiny top_p, which unlike temperature 0 leaves the log-probabilities as the model gives them.
COMPLETE = """(async () => {
  const { CreateMLCEngine } = await import("/node_modules/@mlc-ai/web-llm/lib/index.js");
  const here = location.origin + "/";
  const record = {model_id: "m", model: here + "WEIGHTS/resolve/main/../../", model_lib: here + "LIBRARY"};
  const engine = await CreateMLCEngine("m", {appConfig: {model_list: [record]}});
  return await engine.completions.create(
    {prompt: "PROMPT", max_tokens: TOKENS, temperature: 1, top_p: 1e-6, logprobs: true, top_logprobs: 1});
})()"""
READY = "!document.querySelector('input').disabled"
# Everything that the first answer was on its way.
WATCH = """(window.seen = [], new MutationObserver(() => seen.push(document.querySelector(".model")?.textContent ?? ""))
  .observe(document.querySelector("#talk"), {subtree: true, childList: true, characterData: true}))"""


def workspace(root: Path, formats: tuple[str, ...], targets: tuple[str, ...]) -> Path:
    """The stock model for these formats and targets."""
    (root / "recipes").mkdir(parents=True)
    shutil.copyfile(ROOT / "dodo.py", root / "dodo.py")
    for format_ in formats:
        for target in targets:
            text = f"model: stories\nquantization: {format_}\ntarget: {target}\n"
            (root / "recipes" / f"{format_}-{target}.yaml").write_text(text)
    return root


def doit(root: Path, cache: Path, *arguments: str) -> None:
    environment = {**os.environ, "MLCBUILD_CACHE": str(cache)}
    subprocess.run([sys.executable, "-m", "doit", *arguments], cwd=root, env=environment, check=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """Packages for webgpu and for a CPU, in two formats."""
    if shutil.which("chromium") is None:
        missing("chromium")
    if emscripten.find_emcc() is None:
        missing("emcc")
    if not Path(os.environ.get(WEBLLM) or "none", "@mlc-ai", "web-llm").is_dir():
        missing(f"a folder {WEBLLM} with @mlc-ai/web-llm from npm")
    root = workspace(tmp_path_factory.mktemp("browser"), ("q0f32", "q4f32_1"), ("webgpu", "cpu-exact"))
    doit(root, shared_cache, "build")
    return root / "dist"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as opened:
        yield opened


def site(package: Path, folder: Path) -> Path:
    """`package` after `npm install @mlc-ai/web-llm` in it."""
    shutil.copytree(package, folder)
    (folder / "node_modules").symlink_to(os.environ[WEBLLM])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f32_1"])
def test_webllm_says_what_the_cpu_says(quantization: str, dist: Path, page: Page, tmp_path: Path) -> None:
    tokens = completion(dist / f"{quantization}-webgpu", page, tmp_path)["choices"][0]["logprobs"]["content"]
    assert len(tokens) == TOKENS

    model = load(dist / f"{quantization}-cpu-exact")
    ids = list(model.tokenizer.encode(PROMPT))
    for token in tokens:
        logits = model.logits(ids)[-1].astype("float64")
        best = int(logits.argmax())
        expected = float(logits[best] - logits.max()) - math.log(float(sum(math.exp(v - logits.max()) for v in logits)))
        assert (
            bytes(token["bytes"]).decode() == model.tokenizer.decode([*ids, best])[len(model.tokenizer.decode(ids)) :]
        )
        assert abs(token["logprob"] - expected) < 2e-3
        ids.append(best)


def completion(package: Path, page: Page, folder: Path) -> Any:
    """What WebLLM completes PROMPT to."""
    weights = next(path.name for path in package.iterdir() if path.name.endswith("-MLC"))
    library = next(path.name for path in package.iterdir() if path.suffix == ".wasm")
    script = COMPLETE.replace("WEIGHTS", weights).replace("LIBRARY", library)
    with served(site(package, folder / "site")) as address:
        page.open(address)
        return page.evaluate(script.replace("PROMPT", PROMPT).replace("TOKENS", str(TOKENS)), 300)


def test_the_page_is_javascript_that_can_be_read(tmp_path: Path) -> None:
    node = shutil.which("node") or missing("node")
    script = chat_page("m", "m-MLC", "m.wasm").partition('<script type="module">')[2].partition("</script>")[0]
    (tmp_path / "page.mjs").write_text(script)
    done = subprocess.run([node, "--check", str(tmp_path / "page.mjs")], capture_output=True, text=True)
    assert script and done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_talk_on_the_packaged_page(dist: Path, page: Page, tmp_path: Path) -> None:
    """An answer comes piece by piece, and the next line can be typed after it; what goes wrong is said."""
    folder = site(dist / "q4f32_1-webgpu", tmp_path / "site")
    (config,) = folder.glob("*-MLC/mlc-chat-config.json")
    text = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps({**text, "context_window_size": 84}))  # the answer ends where the context does
    with served(folder) as address:
        page.open(f"{address}/chat.html")
        page.until(READY, 240)
        page.evaluate(f"{WATCH}, 0")
        page.type("Once upon a time there was a dog.")
        assert not page.evaluate(READY)
        page.until(READY, 240)
        seen = page.evaluate("seen")
        assert len(set(seen)) > 5
        assert all(after.startswith(before) for before, after in itertools.pairwise(seen))
        assert page.texts("#talk p") == ["Once upon a time there was a dog.", seen[-1]]

        page.type("And a cat?")
        page.until("document.querySelectorAll('#talk p').length == 4", 30)
        page.until(READY, 60)
        assert "ContextWindowSizeExceeded" in page.texts("#status")[0]
        assert page.texts("#talk p")[2:] == ["And a cat?", ""]


@pytest.mark.slow
def test_the_same_module_in_another_place(dist: Path, shared_cache: Path, tmp_path: Path) -> None:
    """Everything is compiled anew but TVM's runtime, which takes minutes and must not say where it was compiled."""
    other = workspace(tmp_path / "some" / "where", ("q4f32_1",), ("webgpu",))
    for entry in layout.action_files(shared_cache):
        action = json.loads(entry.read_text())
        if action["step"] == "runtime":
            blobs = [shared_cache / layout.blob_name(digest) for digest, *_ in action["files"].values()]
            for path in (entry, *blobs):
                place = other / "cache" / path.relative_to(shared_cache)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    doit(other, other / "cache", "library")
    module = next((dist / "q4f32_1-webgpu").glob("*.wasm")).read_bytes()
    assert str(shared_cache).encode() not in module
    sizes = ((path, path.stat().st_size) for path in (other / "cache" / "cas").rglob("*"))
    assert any(path.read_bytes() == module for path, size in sizes if size == len(module))
