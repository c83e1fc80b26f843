"""`mlcbuild compare`: the table, and what it says of folders that are no packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.compare import compare
from mlcbuild.text import executed


def package(folder: Path, quantization: str, kl: float, size: int) -> Path:
    weights = folder / f"tiny-{quantization}-MLC"
    weights.mkdir(parents=True)
    (weights / "tensor-cache.json").write_text(json.dumps({"metadata": {"BitsPerParam": 4.5}}))
    manifest = {
        "recipe": {
            "model": {"name": "tiny"},
            "quantization": {"name": quantization},
            "target": {"name": "cpu"},
        },
        "files": {
            f"{weights.name}/params_shard_0.bin": {"size": size},
            f"{weights.name}/tensor-cache.json": {"size": 10},
            f"tiny-{quantization}-cpu.so": {"size": 4000},
            "quality.json": {"size": 5},
        },
        "quality": {
            "status": "passed",
            "kl": kl,
            "top1_agreement": 0.91,
            "perplexity": 5.0,
            "reference_perplexity": 4.8,
            "perplexity_increase": 0.042,
            "tokens": 9000,
            "library_executed": True,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_two_packages_side_by_side(tmp_path: Path) -> None:
    one, other = package(tmp_path / "a", "q4f16_1", 0.04, 2000), package(tmp_path / "b", "q8f16_1", 0.002, 4000)
    table = compare(one, other).splitlines()
    assert table[0].split() == ["a", "b", "second", "/", "first"]
    assert "quantization            q4f16_1  q8f16_1" in table
    assert "KL divergence              0.04    0.002            0.05" in table
    assert "same likeliest token      91.0%    91.0%           +0.0%" in table
    assert "library executed            yes      yes" in table
    assert "weights, bytes            2,000    4,000               2" in table
    assert "library, bytes            4,000    4,000               1" in table


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        ({"library_executed": True}, "yes"),
        ({"library_executed": False}, "no"),
        ({"library_executed": False, "execution": {"reason": "no GPU"}}, "no: no GPU"),
        ({"library_executed": "device", "execution": {"device": "NVIDIA H100"}}, "its kernels, on NVIDIA H100"),
        ({"library_executed": "emulated", "execution": {}}, "its kernels, on an emulated device"),
        ({}, "unknown"),
    ],
)
def test_what_ran_a_library_in_words(quality: dict[str, Any], words: str) -> None:
    """`emulated` and `device` are true in Python, and are not `yes`."""
    assert executed(quality) == words


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    one = package(tmp_path / "a", "q4f16_1", 0.04, 2000)
    with pytest.raises(MlcBuildError, match=r"b/manifest.json: no such file; a package is a folder dist/RECIPE"):
        compare(one, tmp_path / "b")
    (one / "manifest.json").write_text("{}")
    with pytest.raises(MlcBuildError, match=r"a/manifest.json: not the manifest of a package \(KeyError\('files'\)\)"):
        compare(one, one)
