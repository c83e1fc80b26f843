"""A webgpu package in WebLLM in headless Chromium, against our CPU library."""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

from mlcbuild.compiler.web import emscripten
from mlcbuild.runtime import load
from tests.support.tools import missing

ROOT = Path(__file__).parents[2]
WEBLLM = "MLCBUILD_TEST_WEBLLM"  # a node_modules folder with @mlc-ai/web-llm
PROMPT, TOKENS = "Once upon a time", 16
# What chat.html does without a person: its own address of the weights, greedy by a tiny top_p, which unlike
# temperature 0 leaves the log-probabilities as the model gives them.
PAGE = """<!doctype html><meta charset="utf-8"><script type="module">
const report = (what) => fetch("/report", {method: "POST", body: JSON.stringify(what)});
try {
  const { CreateMLCEngine } = await import("./node_modules/@mlc-ai/web-llm/lib/index.js");
  const here = location.href.replace(/[^/]*$/, "");
  const record = {model_id: "m", model: here + "WEIGHTS/resolve/main/../../", model_lib: here + "LIBRARY"};
  const engine = await CreateMLCEngine("m", {appConfig: {model_list: [record]}});
  await report(await engine.completions.create(
    {prompt: "PROMPT", max_tokens: TOKENS, temperature: 1, top_p: 1e-6, logprobs: true, top_logprobs: 1}));
} catch (error) { await report({error: `${error && error.stack || error}`}); }
</script>"""
FLAGS = (
    *("--headless", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"),
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's stories for webgpu and for a CPU, in both formats."""
    for tool in ("chromium",):
        if shutil.which(tool) is None:
            missing(tool)
    if emscripten.find_emcc() is None:
        missing("emcc")
    if not Path(os.environ.get(WEBLLM) or "none", "@mlc-ai", "web-llm").is_dir():
        missing(f"a folder {WEBLLM} with @mlc-ai/web-llm from npm")
    root = tmp_path_factory.mktemp("browser")
    (root / "recipes").mkdir()
    shutil.copyfile(ROOT / "dodo.py", root / "dodo.py")
    for format_ in ("q0f32", "q4f32_1"):
        for target in ("webgpu", "cpu-x86_64"):
            text = f"model: stories\nquantization: {format_}\ntarget: {target}\n"
            (root / "recipes" / f"{format_}-{target}.yaml").write_text(text)
    subprocess.run([sys.executable, "-m", "doit", "build"], cwd=root, check=True)
    return root / "dist"


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q0f32", "q4f32_1"])
def test_webllm_says_what_the_cpu_says(quantization: str, dist: Path, tmp_path: Path) -> None:
    package = dist / f"{quantization}-webgpu"
    assert "@mlc-ai/web-llm/lib/index.js" in (package / "chat.html").read_text()
    said = in_browser(package, tmp_path)
    assert "error" not in said, said["error"]
    tokens = said["choices"][0]["logprobs"]["content"]
    assert len(tokens) == TOKENS

    model = load(dist / f"{quantization}-cpu-x86_64")
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


def in_browser(package: Path, folder: Path) -> Any:
    """What the page reports, or {"error": ...}."""
    site = folder / "site"
    shutil.copytree(package, site)
    (site / "node_modules").symlink_to(os.environ[WEBLLM])
    weights = next(path.name for path in site.iterdir() if path.name.endswith("-MLC"))
    library = next(path.name for path in site.iterdir() if path.suffix == ".wasm")
    page = PAGE.replace("WEIGHTS", weights).replace("LIBRARY", library)
    (site / "test.html").write_text(page.replace("PROMPT", PROMPT).replace("TOKENS", str(TOKENS)))
    for port, reports in served(site):
        chromium = subprocess.Popen(
            ["chromium", *FLAGS, f"--user-data-dir={folder / 'profile'}", f"http://127.0.0.1:{port}/test.html"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return reports.get(timeout=300)
        except Empty:
            return {"error": "the page did not report within five minutes"}
        finally:
            chromium.terminate()
            chromium.wait(30)
    raise AssertionError


def served(site: Path) -> Iterator[tuple[int, Queue[Any]]]:
    """A plain file server that also takes reports."""
    reports: Queue[Any] = Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, reports
    finally:
        server.shutdown()
