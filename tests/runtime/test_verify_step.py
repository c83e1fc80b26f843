"""The steps measure and verify: what quality.json says, what stops a package, and what is only recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcbuild.cache.files import tree_of_folder
from mlcbuild.chat.conversation import from_data
from mlcbuild.engine.job import Job, Tree, local_job
from mlcbuild.errors import MlcBuildError
from mlcbuild.steps import measure, verify
from mlcbuild.verify.tokens import token_ids
from tests.chat import chats
from tests.runtime import tiny_llama
from tests.runtime.conftest import CHATML, TEXT

FIELDS: dict[str, Any] = {
    "method": "whole",
    "class": "q4",
    "model_dtype": "float32",
    "kl": None,
    "perplexity_increase": None,
    "perplexity": 1e6,  # these models are random
    "cosine": None,
    "executed": True,
    "notes": [],
    "gate": "fail",
}


class Case:
    """A package with weights that differ from the checkpoint's by some noise, and everything verify needs."""

    def __init__(self, folder: Path, package: Path, library: Path, reference: Any) -> None:
        self.folder = folder
        self.parameters = tiny_llama.mlc_parameters(reference)
        self.inputs = {name: folder / name for name in ("package", "convert", "reference", "text")}
        shutil.copytree(package, self.inputs["package"])
        for name in ("convert", "reference", "text"):
            self.inputs[name].mkdir()
        shutil.copy(library, self.inputs["reference"] / "model.so")
        (self.inputs["text"] / "text").write_text(f"{TEXT * 6}\n<|endoftext|>\n{TEXT[:60]}")
        data, parameters = bytearray(), []
        for name, array in self.parameters.items():
            part = {
                "offset": len(data),
                "nbytes": array.nbytes,
                "shape": list(array.shape),
                "file": "model.safetensors",
            }
            parameters.append({"name": name, "shape": list(array.shape), "dtype": "float32", "parts": [part]})
            data += array.tobytes()
        (self.inputs["convert"] / "model.safetensors").write_bytes(data)
        digest = local_job({"convert": self.inputs["convert"]}, {}, folder / "d").inputs["convert"]
        for parameter in parameters:
            parameter["parts"][0]["blob"] = digest.files["model.safetensors"].digest
        index = {"version": 1, "parameters": parameters}
        (self.inputs["convert"] / "parameters.json").write_text(json.dumps(index))

    @property
    def weights(self) -> Path:
        return self.inputs["package"] / "tiny-q0f32-MLC"

    def disturb(self, noise: float) -> None:
        draw = np.random.default_rng(0)
        noisy = {
            name: array * (1 + noise * draw.normal(size=array.shape).astype(np.float32))
            for name, array in self.parameters.items()
        }
        tiny_llama.write_weights(self.weights, noisy)

    def run(self, name: str, **fields: Any) -> dict[str, Any]:
        """Measure and verify."""
        files = tree_of_folder(self.weights)
        given: dict[str, Path | Tree] = {name: self.inputs[name] for name in ("convert", "reference", "text")}
        given["quantize"] = files.select(("params*", "*-cache.json"))
        given |= {"library": self.inputs["reference"], "checkpoint": files.select(("tokenizer.json",))}
        measured = local_job(given, {"method": "whole"}, self.folder / f"{name}-measure")
        measure.run(measured)
        inputs = {"package": self.inputs["package"], "measure": measured.output}
        job: Job = local_job(inputs, {**FIELDS, **fields}, self.folder / name)
        verify.run(job)
        found: dict[str, Any] = json.loads((job.output / "quality.json").read_text())
        return found


@pytest.fixture
def case(tmp_path: Path, tiny_package: Path, tiny_library: Path, reference: Any) -> Case:
    return Case(tmp_path, tiny_package, tiny_library, reference)


def test_a_package_equal_to_its_checkpoint(case: Case) -> None:
    quality = case.run("job", **{"class": "q0"})
    assert quality == {
        "status": "passed",
        "gate": "fail",
        "method": "whole",
        "kl": 0.0,
        "top1_agreement": 1.0,
        "perplexity": quality["reference_perplexity"],
        "reference_perplexity": quality["reference_perplexity"],
        "unigram_perplexity": quality["unigram_perplexity"],
        "perplexity_increase": 0.0,
        "tokens": quality["tokens"],
        "thresholds": {
            "warn_kl": 0.0001,
            "fail_kl": 0.0002,
            "fail_perplexity_increase": 0.001,
            "warn_reference_perplexity": 1e6,
            "fail_reference_perplexity": 1e6,
        },
        "problems": [],
        "library_executed": True,
        "static_checks": [],
        "template": {
            "checked": False,
            "reason": "the checkpoint has no chat_template",
            "ids": {"prefix": [], "stops": {"2": "<|im_end|>"}},
        },
    }
    assert quality["tokens"] > 50 and quality["perplexity"] > 100


def test_a_miss_fails_with_the_figures(case: Case) -> None:
    case.disturb(0.5)
    with pytest.raises(MlcBuildError) as error:
        case.run("job")
    text = str(error.value)
    assert text.startswith("tiny-q0f32 does not pass verification: KL divergence ")
    assert "nats per token is above 0.12" in text
    assert "`verify: {gate: report}` to record a miss only" in text
    assert not (case.folder / "job" / "output" / "quality.json").exists()


def test_a_miss_that_is_only_recorded(case: Case) -> None:
    case.disturb(0.5)
    quality = case.run("job", gate="report")
    assert (quality["status"], quality["gate"]) == ("failed", "report")
    assert quality["kl"] > 0.12 and quality["problems"]


def test_a_models_own_bounds(case: Case) -> None:
    case.disturb(0.5)
    quality = case.run("job", kl=50.0, perplexity_increase=1000.0)
    assert quality["status"] == "passed"
    own = {"warn_kl": 50.0, "fail_kl": 50.0, "fail_perplexity_increase": 1000.0}
    assert own.items() <= quality["thresholds"].items()


def test_a_random_model_is_said_to_know_nothing(case: Case) -> None:
    """FAULTS.md A3: package and reference agree, so nothing but the reference's own perplexity tells."""
    with pytest.raises(MlcBuildError, match=r"the unquantized model itself has a perplexity of \d+, above \d+"):
        case.run("job", perplexity=None, **{"class": "q0"})
    quality = case.run("reported", perplexity=None, gate="report", **{"class": "q0"})
    assert (quality["status"], quality["kl"]) == ("failed", 0)


def test_the_same_package_gives_the_same_file(case: Case) -> None:
    case.disturb(0.05)
    assert case.run("one", gate="report") == case.run("two", gate="report")


def test_nan_is_never_only_recorded(case: Case) -> None:
    case.parameters["model.norm.weight"][3] = np.nan
    case.disturb(0)
    with pytest.raises(MlcBuildError, match="the package's logits are NaN or Inf: window 0"):
        case.run("job", gate="report")


def test_a_template_that_stops_at_unknown_tokens(case: Case) -> None:
    path = case.weights / "mlc-chat-config.json"
    config = json.loads(path.read_text())
    config["conv_template"] |= {"stop_token_ids": [2, 32000], "stop_str": ["<|eot_id|>", "User:"]}
    path.write_text(json.dumps(config))
    with pytest.raises(MlcBuildError) as error:
        case.run("job")
    assert "template chatml: stop token id 32000 is not in the tokenizer (300 tokens)" in str(error.value)
    assert "stop token `<|eot_id|>` is unknown to the tokenizer" in str(error.value)
    assert "User:" not in str(error.value)


def test_a_conversation_in_tokens_is_compared_with_the_checkpoints(tmp_path: Path, tokenizer: Any) -> None:
    """FAULTS.md A15, A9: ids, and not only texts, that could look alike."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(chats.CHATML)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found, warnings = token_ids(from_data("chatml", CHATML), tmp_path)
    assert (found, warnings) == ({"prefix": [], "stops": {"2": "<|im_end|>"}, "same": True}, [])
    found, (warning,) = token_ids(from_data("chatml", {**CHATML, "system_prefix_token_ids": [0]}), tmp_path)
    assert found["differs"] == {"at": 0, "package": 0, "checkpoint": 1}
    assert "at 0, the package has 0 ('<|endoftext|>'), the checkpoint has 1 ('<|im_start|>')" in warning


def test_a_library_for_another_machine(case: Case) -> None:
    """Its weights run through the CPU library of the same structure; of itself, only what its bytes say is checked."""
    quality = case.run("job", executed=False)
    assert quality["library_executed"] is False
    assert quality["static_checks"][0] == "file format: ELF x86-64"


def test_what_convert_said_of_the_weights_is_in_the_report(case: Case) -> None:
    path = case.inputs["convert"] / "parameters.json"
    assert "notes" not in case.run("before")
    lossy = "12 matrices that AWQ quantized to 4 bits are dequantized; what was lost then stays lost"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": [lossy]}))
    assert case.run("after", notes=["rope …"])["notes"] == ["rope …", lossy]
