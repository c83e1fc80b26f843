"""`mlcbuild doctor`: every target, and what it lacks here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlcbuild.cli.main import main
from mlcbuild.compiler.web import emscripten
from mlcbuild.workspace.doctor import Diagnosis, remedy, render

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_target_builds_or_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))  # neither nvcc nor emcc nor a driver
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert main(["doctor", "--json"]) == 1
    text = capsys.readouterr().out
    assert "secretsecret" not in text
    found = json.loads(text)
    assert found["machine"]["hub token"] == "present" and found["machine"]["emcc"] == "none"
    assert found["targets"]["cpu-x86_64"] == found["targets"]["windows-x86_64"] == {"missing": None}
    assert found["targets"]["webgpu"] == {"missing": f"no emcc here: {emscripten.ADVICE}"}
    assert found["targets"]["vulkan"] == found["targets"]["vulkan-windows"] == {"missing": None}
    assert main(["doctor", "--fix"]) == 0
    assert capsys.readouterr().out == "apt-get install g++ emscripten\n"
    assert found["machine"]["spirv-val"] == "none (Vulkan libraries are built without being validated)"


def test_the_answer_for_people() -> None:
    shown = render(Diagnosis({"emcc": "none"}, {"metal": None, "webgpu": "no emcc here"}))
    assert shown == "emcc    none\n\nmetal   ok\nwebgpu  no emcc here\n"


def test_one_command_brings_all_that_can_be_brought() -> None:
    targets = {
        "metal": None,
        "cuda": "no nvcc: `pip install 'mlcbuild[cuda]'`; nvcc needs g++ (Debian: `apt-get install g++`)",
        "old": "architecture sm_52: nvcc of CUDA 13 knows sm_75",
        "web": "no emcc: `apt-get install emscripten`",
        "again": "no emcc: `apt-get install emscripten`",
    }
    assert remedy(Diagnosis({}, targets)) == (
        "apt-get install g++ emscripten && pip install 'mlcbuild[cuda]'",
        ["old"],
    )
    assert remedy(Diagnosis({}, {"metal": None})) == (None, [])


def test_a_tvm_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tvm.py").write_text("raise ImportError('libtvm_compiler.so: no such file')\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["targets"]
    assert found["cpu-x86_64"]["missing"] == (
        "TVM does not load (ImportError: libtvm_compiler.so: no such file): "
        "`pip install --force-reinstall mlcbuild` brings one that does"
    )
