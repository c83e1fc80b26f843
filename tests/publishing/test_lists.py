"""What apps are told of a package: computed figures, addresses, and a card with the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlcbuild.publishing.card import card
from mlcbuild.publishing.lists import WEB_LIST, lists
from mlcbuild.publishing.memory import memory
from mlcbuild.publishing.origin import Origin
from mlcbuild.publishing.package import Package, installed, read_package

MIB = 2**20


def make_package(dist: Path, target: str, suffix: str, published: bool = True, **metadata: Any) -> Package:
    """A package of 7 MiB of weights: the files that publishing reads, and nothing to run."""
    folder = dist / f"tiny-{target}"
    weights = folder / "tiny-q4f16_1-MLC"
    weights.mkdir(parents=True)
    config = {"context_window_size": 4000, "prefill_chunk_size": 1024, "model_task": "chat"}
    (weights / "mlc-chat-config.json").write_text(json.dumps(config))
    shard = {"records": [{"nbytes": 3 * MIB}, {"nbytes": 4 * MIB}]}
    (weights / "tensor-cache.json").write_text(json.dumps({"records": [shard]}))
    described = {
        "model_type": "llama",
        "context_window_size": 4000,
        "sliding_window_size": -1,
        "kv_state_kind": "kv_cache",
        "kv_cache": {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 64},
        "memory_usage": {"prefill": 5 * MIB, "decode": MIB},
        **metadata,
    }
    (folder / f"tiny-q4f16_1-{target}{suffix}").write_bytes(b"\0code\0" + json.dumps(described).encode() + b"\0more")
    names = ["tiny-q4f16_1-MLC/mlc-chat-config.json", f"tiny-q4f16_1-{target}{suffix}", "quality.json"]
    manifest = {
        "recipe": {
            "name": f"tiny-{target}",
            "model": {"name": "tiny"},
            "quantization": {"name": "q4f16_1", "model_dtype": "float16", "weights": {"bits": 4, "group_size": 32}},
            "target": {"name": target, "device": {"kind": "webgpu"}},
        },
        "quality": {"status": "passed", "kl": 0.0123, "perplexity": 3.4, "reference_perplexity": 3.37},
        "files": {name: {"sha256": "", "size": 0} for name in names},
        "steps": {"quantize": {"tree": "ab" * 32}},
        "mlcbuild": "0.1.0",
        "tools": {"apache-tvm": "0.27.0"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if published:
        where = {
            "weights": "me/tiny",
            "weights_url": "https://hub/me/tiny",
            "library_url": f"https://hub/{target}{suffix}",
            "model_lib": "llama_q4f16_1_0123" if suffix == ".tar" else "",
        }
        (folder / "published.json").write_text(json.dumps(where))
    return read_package(folder)


def test_memory_is_weights_and_cache_and_the_largest_functions_own(tmp_path: Path) -> None:
    package = make_package(tmp_path, "webgpu", ".wasm")
    found = memory(package)
    # Keys and values, 2 layers, 4 heads of 64, 4000 tokens (250 pages of 16), float16.
    assert found.kv_cache == 2 * 2 * 4 * 64 * 4000 * 2
    assert (found.parameters, found.temporary) == (7 * MIB, 5 * MIB)
    assert found.megabytes == round(12 + found.kv_cache / MIB, 2) and found.low_resource
    assert memory(package, context=1000).kv_cache == 2 * 2 * 4 * 64 * 1008 * 2
    sliding = make_package(tmp_path / "other", "webgpu", ".wasm", sliding_window_size=1024)
    assert memory(sliding).kv_cache == 2 * 2 * 4 * 64 * 1024 * 2
    recurrent = make_package(tmp_path / "third", "webgpu", ".wasm", kv_state_kind="rnn_state")
    assert memory(recurrent).kv_cache == 0


def test_webllm_and_phones_are_told_of_what_is_published(tmp_path: Path) -> None:
    for target, suffix in (("webgpu", ".wasm"), ("iphone", ".tar"), ("cpu", ".so")):
        make_package(tmp_path, target, suffix)
    make_package(tmp_path / "not", "webgpu", ".wasm", published=False)
    found = lists(installed(tmp_path))
    assert set(found) == {WEB_LIST, "iphone/mlc-package-config.json"}
    total = memory(read_package(tmp_path / "tiny-webgpu"))
    assert json.loads(found[WEB_LIST])["model_list"] == [
        {
            "model": "https://hub/me/tiny",
            "model_id": "tiny-q4f16_1-MLC",
            "model_lib": "https://hub/webgpu.wasm",
            "vram_required_MB": total.megabytes,
            "low_resource_required": True,
            "overrides": {"context_window_size": 4000},
            "required_features": ["shader-f16"],
        }
    ]
    assert json.loads(found["iphone/mlc-package-config.json"]) == {
        "device": "iphone",
        "model_list": [
            {
                "model": "HF://me/tiny",
                "model_id": "tiny-q4f16_1-MLC",
                "estimated_vram_bytes": total.total,
                "overrides": {"context_window_size": 4000, "prefill_chunk_size": 1024},
                "model_lib": "llama_q4f16_1_0123",
            }
        ],
        "model_lib_path_for_prepare_libs": {"llama_q4f16_1_0123": "iphone.tar"},
    }
    assert lists(installed(tmp_path / "not")) == {}


def test_the_card_names_the_base_at_its_commit(tmp_path: Path) -> None:
    package = make_package(tmp_path, "webgpu", ".wasm")
    origin = Origin({"owner/base": "0123abc", "owner/lora": "4567def"}, {"license": "other", "license_name": "llama3"})
    text = card("me/tiny", [package], origin, {package.recipe: "https://hub/webgpu.wasm"})
    assert "base_model:\n- owner/base\n- owner/lora\n" in text and "base_model_relation: quantized" in text
    assert "[owner/base](https://huggingface.co/owner/base) at commit `0123abc`" in text
    assert "license: other\nlicense_name: llama3\n" in text and "carried over: llama3." in text
    assert 'model_lib: "https://hub/webgpu.wasm"' in text
    assert "The base states no licence" in card("me/tiny", [package], Origin(), {})


def test_the_card_of_a_model_of_texts_has_cosines(tmp_path: Path) -> None:
    place = make_package(tmp_path, "webgpu", ".wasm").folder
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["quality"] = {"status": "passed", "method": "embeddings", "cosine": 0.9912, "lowest_cosine": 0.97}
    (place / "manifest.json").write_text(json.dumps(manifest))
    text = card("me/tiny", [read_package(place)], Origin(), {})
    assert "| cosine to the base's vectors | 0.9912 |" in text and "| lowest cosine of a text | 0.97 |" in text
    assert "KL divergence" not in text and "perplexity" not in text
