"""However a model's weights are published, the package is the one of the same weights as plain safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.hub_server import COMMIT, Fault, Hub, serving
from tests.end_to_end.workspace import BIN, Workspace, digests, make_workspace

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

Tensors = dict[str, Any]


def load(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def save(folder: Path, like: Path, tensors: Tensors) -> Path:
    """A checkpoint with the config and the tokenizer of another."""
    from safetensors.torch import save_file

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


def sixtyfourths(like: Tensors, seed: int, limit: int = 64) -> Tensors:
    """Tensors of n / 64, |n| < limit: sums of a few are exact in bfloat16, which has 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randint(1 - limit, limit, value.shape, generator=generator) / 64).bfloat16()
        for name, value in like.items()
    }


def added(one: Tensors, other: Tensors) -> Tensors:
    total = {name: one[name].float() + other[name].float() for name in one}
    assert all(torch.equal(value, value.bfloat16().float()) for value in total.values()), "choose smaller numbers"
    return {name: value.bfloat16() for name, value in total.items()}


@pytest.fixture
def build(tmp_path: Path, shared_cache: Path, tiny_checkpoint: Path) -> Callable[..., dict[str, str]]:
    """Build a model file's text; the weights folder of its package, by content."""
    workspace = make_workspace(tmp_path / "workspace", shared_cache, tiny_checkpoint)

    def build(name: str, source: str) -> dict[str, str]:
        workspace.write(f"recipes/models/{name}.yaml", f"{source}\ntemplate: chatml\nverify: {{gate: report}}\n")
        workspace.recipe(f"{name}-cpu", model=name)
        workspace.doit("build", f"recipe={name}-cpu")
        return digests(workspace.root / "dist" / f"{name}-cpu" / f"{name}-q4f16_1-MLC")

    return build


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_pickles(build: Callable[..., Any], tmp_path: Path, tiny_checkpoint: Path, legacy: bool) -> None:
    tensors = load(tiny_checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    assert name in tensors
    tensors[name] = tensors[name].T.contiguous().T  # as it happens in old checkpoints: not row-major
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # likewise: a leftover
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "training_args.bin").write_bytes(b"not weights, and not even looked at")
    assert build("pickled", f"source: {{path: {folder}}}") == build("plain", f"source: {{path: {tiny_checkpoint}}}")


def test_sharded_pickles(build: Callable[..., Any], tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weight_map = {}
    for number, (name, tensor) in enumerate(load(tiny_checkpoint).items()):
        file = f"pytorch_model-{number:05}-of-00099.bin"
        torch.save({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert build("shards", f"source: {{path: {folder}}}") == build("plain", f"source: {{path: {tiny_checkpoint}}}")


def test_code_in_a_pickle_stops_the_build(tmp_path: Path, shared_cache: Path, tiny_checkpoint: Path) -> None:
    folder = tmp_path / "evil"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")
    workspace = make_workspace(tmp_path / "workspace", shared_cache, folder)
    done = workspace.doit("build", check=False)
    assert done.returncode == 1
    assert "its pickle names torch.nn.modules.linear.Linear, which is refused" in done.stdout + done.stderr


@pytest.fixture
def pair(tmp_path: Path, tiny_checkpoint: Path) -> tuple[Path, Path, Path]:
    """A base, a delta, and their sum. The base has fewer tokens than the delta."""
    like = load(tiny_checkpoint)
    base, difference = sixtyfourths(like, 1), sixtyfourths(like, 2)
    tokens = {name for name in like if "embed_tokens" in name or "lm_head" in name}
    for name in tokens:
        base[name][-3:] = 0
    whole = save(tmp_path / "whole", tiny_checkpoint, added(base, difference))
    for name in tokens:
        base[name] = base[name][:-3]
    base["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return (
        save(tmp_path / "base", tiny_checkpoint, base),
        save(tmp_path / "delta", tiny_checkpoint, difference),
        whole,
    )


def test_base_and_delta(build: Callable[..., Any], pair: tuple[Path, Path, Path]) -> None:
    base, difference, whole = pair
    summed = build("summed", f"source: {{path: {difference}}}\ndelta_of: {{path: {base}}}")
    assert summed == build("whole", f"source: {{path: {whole}}}")


def test_what_a_change_of_the_base_builds_again(
    tmp_path: Path, shared_cache: Path, pair: tuple[Path, Path, Path]
) -> None:
    base, difference, _ = pair
    workspace: Workspace = make_workspace(tmp_path / "workspace", shared_cache, difference)
    workspace.model("tiny", difference, f"delta_of: {{path: {base}}}\nverify: {{gate: report}}\n")
    goal = ("build", "recipe=tiny-cpu")
    workspace.doit(*goal)
    assert workspace.built(*goal) == []
    manifest = json.loads((workspace.root / "dist/tiny-cpu/manifest.json").read_text())
    assert manifest["delta_of"].keys() >= {"config.json", "model.safetensors"}
    assert manifest["recipe"]["model"]["delta_of"] == {"path": "base"}
    (base / "notes.txt").write_text("nothing that counts")
    assert workspace.built(*goal) == ["download:tiny-base"]
    tensors = load(base)
    tensors["model.norm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors")
    assert workspace.built(*goal)[:2] == ["download:tiny-base", "convert:tiny"]
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    done = workspace.doit(*goal, check=False)
    assert "convert:tiny: delta_of: tensor model.norm.weight is missing" in done.stdout + done.stderr


@pytest.mark.parametrize("rslora", [False, True])
def test_base_and_lora(build: Callable[..., Any], tmp_path: Path, tiny_checkpoint: Path, rslora: bool) -> None:
    from safetensors.torch import save_file

    like = load(tiny_checkpoint)
    base = sixtyfourths(like, 3)
    generator = torch.Generator().manual_seed(4)
    factors: dict[str, Any] = {}
    products = {name: torch.zeros_like(value) for name, value in base.items()}
    rank, scale = 4, 2.0
    for name in base:
        if "q_proj" in name or "down_proj" in name:
            out, into = base[name].shape
            a = torch.randint(-1, 2, (rank, into), generator=generator).float()
            b = torch.randint(-4, 5, (out, rank), generator=generator).float() / 64
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            products[name] = scale * (b @ a)
    head = sixtyfourths({"head": like["lm_head.weight"]}, 5)["head"]
    factors["base_model.model.lm_head.weight"] = head
    whole = save(tmp_path / "whole", tiny_checkpoint, added(base, products) | {"lm_head.weight": head})
    plain = save(tmp_path / "plain", tiny_checkpoint, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "bias": "none", "modules_to_save": ["lm_head"], "use_rslora": rslora,
        "lora_alpha": scale * (2 if rslora else rank), "target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = build("merged", f"source: {{path: {plain}}}\nlora: {{path: {adapter}}}")
    assert merged == build("whole", f"source: {{path: {whole}}}")
    assert merged != build("plain", f"source: {{path: {plain}}}")


SECRET = "hf_PlantedTokenThatNobodyMaySee"


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    """A private repository with the tiny checkpoint, the same weights as pickles beside it, and other things."""
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    others = {"pytorch_model.bin": b"never fetched", "README.md": b"a card", "onnx/model.onnx": b"a graph"}
    with serving(Hub(files | others, token=SECRET)) as made:
        yield made


def test_a_model_on_a_hub(
    hub: Hub, build: Callable[..., Any], tmp_path: Path, shared_cache: Path, tiny_checkpoint: Path
) -> None:
    workspace = make_workspace(tmp_path / "remote", shared_cache, tiny_checkpoint)
    workspace.write("recipes/models/tiny.yaml", "source: {hf: owner/name}\ntemplate: chatml\nverify: {gate: report}\n")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": SECRET}
    said = []

    def run(*command: str, **more: str) -> str:
        done = workspace.run(*command, check=False, environment=environment | more)
        said.append(done.stdout + done.stderr)
        return said[-1]

    assert "hf:owner/name: the repository is private, or its name is wrong" in run("mlcbuild", "lock", HF_TOKEN="")
    assert "locked=1 forbids to add it: `mlcbuild lock tiny` does" in run("doit", "build", "locked=1")
    assert "locked     owner/name" in run("mlcbuild", "lock", "tiny")
    hub.faults = [Fault("model.safetensors", cut=20_000, times=2), Fault("tokenizer.json", 429, {"Retry-After": "0"})]
    run("doit", "build", "locked=1")
    package = workspace.root / "dist" / "tiny-cpu" / "tiny-q4f16_1-MLC"
    assert sorted(digests(package).values()) == sorted(
        build("tiny", f"source: {{path: {tiny_checkpoint}}}").values()
    ), "\n".join(said)
    fetched = {request.split("/")[-1].split(" ")[0] for request in hub.requests if "/resolve/" in request}
    assert fetched == {path.name for path in tiny_checkpoint.iterdir()}
    assert any(" from " in request for request in hub.requests)
    # The branch moves, and the build does not.
    hub.move("f" * 40, {**hub.files, "config.json": b"{}"})
    manifest = json.loads((workspace.root / "dist" / "tiny-cpu" / "manifest.json").read_text())
    assert manifest["recipe"]["model"]["source"] == {"hf": "owner/name", "revision": None}
    # Failures of all kinds say something, and none says the token.
    hub.requests.clear()
    for path in [*(shared_cache / "ac").rglob("*.json")]:
        if "repo" in json.loads(path.read_text())["fields"]:
            path.unlink(missing_ok=True)
    for fault in (Fault("model.safetensors", 401), Fault("model.safetensors", 403), Fault("model.safetensors", 404)):
        hub.faults = [fault]
        assert f"download:tiny: hf:owner/name@{COMMIT[:12]}: model.safetensors: " in run("doit", "build")
    assert "ok download:tiny" in run("doit", "build")
    assert [request for request in hub.requests if COMMIT not in request] == []
    hub.faults = [Fault("revision/main", 401, times=9), Fault("models/owner/name", 403)]
    run("mlcbuild", "lock", "--update")
    assert SECRET not in "".join(said)
    holders = [
        path
        for folder in (workspace.root, shared_cache, tmp_path / "hf")
        for path in folder.rglob("*")
        if SECRET.encode() in _content(path)
    ]
    assert not holders


def _content(path: Path) -> bytes:
    """Nothing of a folder, or of a file that another worker's build has just renamed."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_a_killed_download_goes_on_in_the_next_build(hub: Hub, tmp_path: Path, tiny_checkpoint: Path) -> None:
    workspace = make_workspace(tmp_path / "remote", tmp_path / "cache", tiny_checkpoint)
    workspace.write("recipes/models/tiny.yaml", "source: {hf: owner/name}\ntemplate: chatml\n")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": SECRET}
    workspace.run("mlcbuild", "lock", environment=environment)
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    place = hashlib.sha256(weights).hexdigest()
    hub.faults = [Fault("model.safetensors", pause=60.0)]
    command = [str(BIN / "doit"), "download:tiny"]
    process = subprocess.Popen(command, cwd=workspace.root, env=workspace.environment(environment))
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in (tmp_path / "cache" / "partial").glob(f"*/{place}")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    hub.requests.clear()
    workspace.doit("download:tiny", environment=environment)
    (request,) = (request for request in hub.requests if "model.safetensors" in request)
    assert 0 < int(request.rpartition(" from ")[2]) <= len(weights)
    assert not [*(tmp_path / "cache" / "partial").iterdir()]
