"""`mlcbuild test-run`: a recipe proven on a small random model, before anything is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlcbuild.runtime import load
from tests.end_to_end.workspace import Workspace, edit_json

pytestmark = pytest.mark.slow


@pytest.fixture
def config_only(workspace: Workspace, tmp_path: Path, tiny_checkpoint: Path) -> Workspace:
    """A model of which there is a config.json and nothing else, as recipes.lock has it of a repository."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", folder)
    workspace.model("tiny", folder)
    return workspace


def test_every_step_runs_and_nothing_is_installed_in_dist(config_only: Workspace) -> None:
    workspace = config_only
    done = workspace.run("mlcbuild", "test-run", "tiny-cpu")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("tiny-cpu: every step works (")
    assert "2 layers and 512 tokens" in last
    assert not (workspace.root / "dist").exists()
    package = workspace.cache / "test-run" / "dist" / "tiny-cpu"
    assert last.endswith(str(package))
    quality = json.loads((package / "quality.json").read_text())
    assert quality["gate"] == "report" and 0 < quality["kl"] < 1
    config = json.loads((package / "tiny-q4f16_1-MLC" / "mlc-chat-config.json").read_text())
    assert (config["quantization"], config["vocab_size"], config["conv_template"]["name"]) == (
        "q4f16_1", 512, "chatml",
    )  # fmt: skip
    assert load(package).generate("anything", max_tokens=3) is not None


def test_a_second_run_finds_everything(config_only: Workspace) -> None:
    config_only.run("mlcbuild", "test-run", "tiny-cpu")
    again = config_only.run("mlcbuild", "test-run", "tiny-cpu").stdout.splitlines()
    assert len(again) == 1, again


def test_calibration_is_tried_too(config_only: Workspace) -> None:
    config_only.recipe("calibrated", "q4f16_1-calibrated")
    done = config_only.run("mlcbuild", "test-run", "calibrated,tiny-*")
    assert "ok calibrate:tiny" in done.stdout
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[-2:]] == ["calibrated", "tiny-cpu"]


def test_a_format_that_is_read_from_checkpoints_only(
    workspace: Workspace, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """The random checkpoint is packed as AutoAWQ packs; groups of 128 need inputs that are multiples of it."""
    folder = tmp_path / "wide"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "config.json", folder)
    edit_json(folder / "config.json", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64})
    workspace.model("wide", folder)
    workspace.recipe("wide-awq", "q4f16_autoawq", "wide")
    done = workspace.run("mlcbuild", "test-run", "wide-awq")
    assert done.stdout.splitlines()[-1].startswith("wide-awq: every step works")
    quality = json.loads((workspace.cache / "test-run/dist/wide-awq/quality.json").read_text())
    assert quality["kl"] < 0.005  # nothing is lost in reading it


def test_a_recipe_that_cannot_work_fails_as_its_build_would(config_only: Workspace) -> None:
    config_only.write(
        "recipes/quantizations/coarse.yaml",
        "class: q4\nmodel_dtype: float32\n"
        "weights: {bits: 4, group_size: 48, storage_dtype: uint32, layout: NK, symmetric: false, "
        "packed_scale_min: bf16x2}\n",
    )
    config_only.recipe("coarse", "coarse")
    done = config_only.run("mlcbuild", "test-run", "coarse,tiny-cpu", check=False)
    assert done.returncode == 1
    assert "coarse: quantize:tiny-coarse: parameter model.layers.0.self_attn.qkv_proj.weight" in done.stderr
    assert "tiny-cpu: every step works" in done.stderr + done.stdout  # the others were tried all the same
    assert "Traceback" not in done.stderr


def test_an_unknown_name(config_only: Workspace) -> None:
    done = config_only.run("mlcbuild", "test-run", "tiny-cup", check=False)
    assert done.returncode == 1
    assert "no recipe is named `tiny-cup`; did you mean `tiny-cpu`?" in done.stderr
