"""A GGUF file through unpack and convert: as transformers dequantizes it, whatever its types."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from mlcbuild.checkpoints.mapped import FLOATS
from mlcbuild.engine.job import Job, local_job
from mlcbuild.errors import MlcBuildError
from mlcbuild.gguf import checkpoint, repository, tensors, tokenizer
from mlcbuild.gguf.config import _factors, config
from mlcbuild.gguf.header import Header, Tensor, parse, read_header
from mlcbuild.models.architecture import choose, resolve
from mlcbuild.models.parameters import ignored
from mlcbuild.steps import convert, unpack
from tests.gguf import files
from tests.support.architectures import known


def unpacked(folder: Path, *more: Path) -> Job:
    job = local_job({"files": folder, **({"tokenizer": more[0]} if more else {})}, {}, folder.parent / "unpack")
    unpack.run(job)
    return job


def converted(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """parameters.json, and the parameters' numbers by name."""
    folder = job.output
    for name, entry in job.reused.items():
        (folder / name).symlink_to(entry.path)
    made = json.loads((folder / "config.json").read_text())
    structure = resolve(choose(known(), made), made, {})
    again = local_job({"checkpoint": folder}, {"structure": structure.to_json()}, folder.parent.parent / "convert")
    convert.run(again)
    document = json.loads((again.output / "parameters.json").read_text())
    found = {}
    for each in document["parameters"]:
        storage = dict(FLOATS.values())[each["dtype"]]
        parts = []
        for part in each["parts"]:
            path = again.output / part["file"] if part["file"].startswith("tensors-") else folder / part["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == part["blob"]
            raw = np.fromfile(path, np.uint8, part["nbytes"], offset=part["offset"]).view(storage)
            wide = (raw.astype(np.uint32) << 16).view(np.float32) if each["dtype"] == "bfloat16" else raw
            parts.append(wide.astype(np.float32).reshape(part["shape"]))
        found[each["name"]] = np.concatenate(parts)
    return document, found


def test_every_type_as_transformers_dequantizes_it(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (tmp_path / "in").mkdir()
    files.write(tmp_path / "in" / "tiny.gguf")
    document, found = converted(unpacked(tmp_path / "in"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "in", gguf_file="tiny.gguf", dtype=torch.float32)
    state = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    for i in range(files.LAYERS):
        at = f"model.layers.{i}"
        for name, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            state[f"{at}.{name}.weight"] = np.concatenate([state[f"{at}.{part}.weight"] for part in parts])
    assert len(found) == 6 * files.LAYERS + 3
    for name, values in found.items():
        np.testing.assert_array_equal(values, state[name], name)
    (note,) = document["notes"]
    assert "1 of IQ4_XS" in note and note.endswith("are dequantized; what was lost then stays lost")


def test_config_and_tokenizer_are_the_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files.write(tmp_path / "in" / "tiny.gguf", kinds=files.KINDS[:1])
    job = unpacked(tmp_path / "in")
    made = {path.name: json.loads(path.read_text()) for path in job.output.iterdir()}
    assert made["config.json"] == {
        "model_type": "llama", "vocab_size": 265, "tie_word_embeddings": False, "max_position_embeddings": 128,
        "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "quantization_config": {"quant_method": "gguf"},
    }  # fmt: skip
    assert made["generation_config.json"] == {"bos_token_id": 1, "eos_token_id": [2, 264]}
    assert made["tokenizer_config.json"]["chat_template"] == files.FACTS["tokenizer.chat_template"]
    assert job.reused.keys() == {"tiny.gguf"}
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(job.output / "tokenizer.json")).encode("ab<|end|>é")
    assert encoded.tokens == ["<s>", "▁ab", "<|end|>", "▁", "<0xC3>", "<0xA9>"]


def test_tokenizer_from_another_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    files.write(tmp_path / "in" / "tiny.gguf", {"tokenizer.ggml.model": "rwkv"}, kinds=files.KINDS[:1])
    job = unpacked(tmp_path / "in", tmp_path / "other")
    assert [path.name for path in job.output.iterdir()] == ["config.json"]
    assert job.reused.keys() == {"tiny.gguf", "tokenizer.json"}


def test_parts_are_one_model(tmp_path: Path) -> None:
    for name in ("whole", "split", "a", "b"):
        (tmp_path / name).mkdir()
    files.write(tmp_path / "whole" / "tiny.gguf", kinds=files.KINDS[1:5])
    files.write(tmp_path / "split" / "tiny.gguf", kinds=files.KINDS[1:5], split=11)
    names = [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert checkpoint.local_parts(tmp_path / "split" / names[1]) == [tmp_path / "split" / name for name in names]
    both = []
    for name in ("whole", "split"):
        (tmp_path / name).rename(tmp_path / name[0])
        (tmp_path / name).mkdir()
        (tmp_path / name[0]).rename(tmp_path / name / "in")
        both.append(converted(unpacked(tmp_path / name / "in"))[1])
    assert both[0].keys() == both[1].keys()
    assert all(np.array_equal(values, both[1][name]) for name, values in both[0].items())
    (tmp_path / "split" / "in" / names[2]).unlink()
    with pytest.raises(MlcBuildError, match=f"{names[0]}: one of 3 parts, of which {names[2]} is not there: get it"):
        checkpoint.local_parts(tmp_path / "split" / "in" / names[0])
    with pytest.raises(MlcBuildError, match="of its 30 tensors, 22 are in the files that are here"):
        checkpoint.read({name: tmp_path / "split" / "in" / name for name in names[:2]})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[:4000], "truncated: its header goes on after the 4,000 bytes; get it again"),
        (lambda data: b"", "truncated: the file is empty"),
        (lambda data: b"GGML" + data[4:], "not a GGUF file: it begins with b'GGML'"),
        (lambda data: data[:4] + b"\0\0\0\3" + data[8:], "its numbers are big-endian, and only versions 2 and 3"),
        (lambda data: data[:4] + b"\1\0\0\0" + data[8:], "version 1 of GGUF, and only versions 2 and 3"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "at most 500,000 and 10,000 are read"),
        (lambda data: data.replace(b"general.architecture", b"general.architectura"), "says no general.architecture"),
        (lambda data: data.replace(b"block_count", b"block_counc"), "of the facts about `llama`: `block_count` is"),
        (lambda data: data.replace(b"token_embd", b"token_embb"), "no tensor token_embd.weight [tokens, size]"),
        (lambda data: data.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "two tensors have one name"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    path = tmp_path / "tiny.gguf"
    files.write(path, kinds=files.KINDS[:1])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MlcBuildError) as error:
        checkpoint.config_of(read_header(path, "tiny.gguf"), {"tiny.gguf": path})
    assert str(error.value).startswith("tiny.gguf: ") and problem in str(error.value)


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"general.architecture": "llame"}, "general.architecture `llame` is not one whose config.json can be made of "
         "a GGUF file (did you mean `llama`?); they are arcee, bloom, "),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of kind `t5` is not made of a GGUF file: name a"),
        ({"tokenizer.ggml.model": None}, "it has no tokenizer: name a checkpoint that has its files: `tokenizer_from:"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "own"}, "tokenizer.ggml.pre `own`: how it cuts a"),
        ({"tokenizer.ggml.scores": [0.5]}, "265 tokens, but 1 in tokenizer.ggml.scores"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": None}, "no tokenizer.ggml.pre, as in files before May "
         "2024: how it cuts a text is not known: name a checkpoint that has its files: `tokenizer_from:"),
        ({"tokenizer.ggml.eot_token_id": 265}, "a text ends at token 265, and there are 265: name a checkpoint"),
        ({"llama.attention.scale": 0.5}, "of the facts about `llama`: `attention.scale` is 0.5, which config.json "
         "would not say: name the checkpoint that it was made from"),
        ({"llama.attention.sliding_window": 32}, "`attention.sliding_window` is 32, which config.json would not say"),
        ({"llama.attention.causal": False}, "`attention.causal` is False, which config.json would not say"),
        ({"llama.rope.dimension_count": 32}, "`rope.dimension_count` is 32, which config.json would not say"),
    ],
)  # fmt: skip
def test_what_is_not_known(tmp_path: Path, facts: dict[str, Any], problem: str) -> None:
    (tmp_path / "in").mkdir()
    files.write(tmp_path / "in" / "tiny.gguf", facts, kinds=files.KINDS[:1])
    with pytest.raises(MlcBuildError) as error:
        unpacked(tmp_path / "in")
    assert str(error.value).startswith("tiny.gguf: ") and problem in str(error.value)


def test_damaged_tensors(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "tiny.gguf"
    files.write(path, kinds=files.KINDS[3:4])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20_000])
    with pytest.raises(MlcBuildError, match=r"tensor output.weight: truncated: it ends at byte \d+, the file has"):
        converted(unpacked(path.parent))
    at = whole.index(b"\0output.weight") + len("\0output.weight") + 4 + 16
    path.write_bytes(whole[:at] + bytes([99]) + whole[at + 1 :])
    for name in ("unpack", "convert"):
        (tmp_path / name).rename(tmp_path / f"{name}-before")
    with pytest.raises(
        MlcBuildError, match=r"tensor output.weight: ggml's type 99 is unknown; known are F32, F16, Q4_0"
    ):
        converted(unpacked(path.parent))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files.write(tmp_path / "in" / "tiny.gguf", kinds=files.KINDS[:1], without="blk.1.ffn_up.weight")
    with pytest.raises(MlcBuildError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing from the checkpoint"):
        converted(unpacked(tmp_path / "in"))


def test_scalings_of_rope() -> None:
    """Those of llama.cpp's facts and tensors, as transformers has them."""

    def scaling(facts: dict[str, Any], factors: Mapping[str, list[float]] = MappingProxyType({}), kind: int = 0) -> Any:
        found = {n: Tensor(n, "f", (len(v),), kind, i) for i, (n, v) in enumerate(factors.items())}
        found["token_embd.weight"] = Tensor("token_embd.weight", "f", (265, 256), 0, 0)
        whole = {"general.architecture": "llama", **files.FACTS, "llama.rope.freq_base": 5e5, **facts}
        values = [np.array(each, np.float32).tobytes() for each in factors.values()]
        return config(Header("f", whole, found), lambda file, offset, size: values[offset]).get("rope_scaling")

    kind, four = ({f"llama.rope.scaling.{key}": value} for key, value in (("type", "none"), ("factor", 4.0)))
    for none in ({}, kind, {**kind, **four}, {"llama.rope.scaling.factor": 0.0}, {"llama.rope.scaling.type": "yarn"}):
        assert scaling(none) is None
    linear = {"llama.rope.scaling.type": "linear", **four}
    for same in (linear, four, {"llama.rope.scale_linear": 4.0}, {**linear, "llama.rope.scale_linear": 2.0}):
        assert scaling(same) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32}
    for told, length in ((yarn, 32), ({"llama.rope.scaling.type": "yarn"}, 128)):
        assert scaling({**linear, **told}) == {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": length}  # fmt: skip
    for factor in (8.0, 32.0):
        assert scaling({}, {"rope_freqs.weight": list(_factors(factor, 8192, 5e5, 32))}) == {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    with pytest.raises(MlcBuildError, match=r"the factors in rope_freqs.weight are not those of Llama 3's scaling"):
        scaling({}, {"rope_freqs.weight": [1.0, 2.0, 1.0, 8.0]})
    both = {"rope_factors_short.weight": [1.0, 1.1], "rope_factors_long.weight": [1.5, 2.9]}
    assert scaling({}, both) == {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 2.9]}
    for other in ("longrope", "su"):
        for more in ({}, four):
            with pytest.raises(MlcBuildError, match=rf"rope.scaling.type `{other}` without its factors is not read"):
                scaling({**more, "llama.rope.scaling.type": other})
    with pytest.raises(MlcBuildError, match=r"one of the tensors rope_factors_short.weight and .*, without the other"):
        scaling({}, {"rope_factors_short.weight": [1.0, 1.1]})
    with pytest.raises(MlcBuildError, match=r"rope is scaled by 4.0 and by rope_freqs.weight: name the checkpoint"):
        scaling(four, {"rope_freqs.weight": list(_factors(8.0, 8192, 5e5, 32))})
    with pytest.raises(
        MlcBuildError, match=r"tensor rope_freqs.weight: ggml's type 1, \[2\]; expected a list of float32"
    ):
        scaling({}, {"rope_freqs.weight": [1.0, 2.0]}, kind=1)


def test_what_the_facts_of_other_architectures_make() -> None:
    """Windows by layer, no experts, facts of models that the file is not, and tensors as no rule has them."""

    def made(name: str, facts: dict[str, Any], **shapes: tuple[int, ...]) -> dict[str, Any]:
        whole = {key.replace("llama.", f"{name}."): value for key, value in files.FACTS.items()}
        whole |= {"general.architecture": name, **{f"{name}.{key}": value for key, value in facts.items()}}
        every = {"token_embd": (265, 256), **{key.replace("__", "."): shape for key, shape in shapes.items()}}
        found = {f"{n}.weight": Tensor(f"{n}.weight", "f", shape, 0, 0) for n, shape in every.items()}
        return config(Header("f", whole, found), lambda file, offset, size: b"")

    window, kinds = "attention.sliding_window", ["sliding_attention", "full_attention", "sliding_attention"]
    for pattern in ([True, False, True], 2):
        olmo = made("olmo2", {window: 16, f"{window}_pattern": pattern})
        assert (olmo["model_type"], olmo["sliding_window"], olmo["layer_types"]) == ("olmo3", 16, kinds)
    assert made("olmo2", {window: 16})["model_type"] == "olmo3", "whose layers are then every fourth"
    assert made("olmo2", {})["model_type"] == "olmo2"
    gemma = made("gemma3", {window: 16, f"{window}_pattern": [True, False, True]})
    assert gemma["layer_types"] == kinds and "sliding_window_pattern" not in gemma
    assert "num_local_experts" not in made("llama", {"expert_count": 0, "expert_used_count": 0})
    # Granite 4.0 Micro, whose converter writes what Granite 4 with Mamba has.
    scans = {f"ssm.{key}": 4 for key in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")}
    granite = {**scans, "attention.head_count_kv": [2] * 3, "expert_shared_feed_forward_length": 512}
    assert made("granite", granite) == made("granite", {})
    # Nemotron 3 Super, of which the last layer guesses further tokens.
    more = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length")
    super_ = {**scans, **dict.fromkeys(more, 4), "attention.head_count_kv": [0, 2, 2], "feed_forward_length": [0, 0, 8]}
    nemotron = made("nemotron_h_moe", {**super_, "nextn_predict_layers": 1})
    assert nemotron["layers_block_type"] == ["mamba", "attention"]
    assert "blk.2.*" in ignored(resolve(choose(known(), nemotron), nemotron, {}))
    with pytest.raises(MlcBuildError, match=r"expert_gating_func is 1, but this architecture computes only '2'"):
        made("lfm2moe", {"shortconv.l_cache": 3, "expert_gating_func": 1})
    with pytest.raises(
        MlcBuildError, match=r"f: a tensor for each expert \(blk.0.ffn_gate.0.weight\), as llama.cpp wrote"
    ):
        made("llama", {"expert_count": 8}, blk__0__ffn_gate__0=(512, 256))
    with pytest.raises(MlcBuildError, match=r"f: a norm for each head \(blk.0.attn_q_norm.weight\), as StableLM 2 12B"):
        made("stablelm", {}, blk__0__attn_q_norm=(4, 64))


def test_two_tokens_of_one_text() -> None:
    assert tokenizer._unlike(["a", "a", "a<1>", "b"]) == ["a", "a<1><1>", "a<1>", "b"]


def test_types_that_are_not_computed() -> None:
    import gguf

    assert set(files.KINDS) < set(tensors.computed_kinds())
    header = Header("f", {}, {"t": Tensor("t", "f", (2, 256), int(gguf.GGMLQuantizationType.F64), 0)})
    with pytest.raises(MlcBuildError, match="f: tensor t: floats of the type F64 are not computed; known are F32, F16"):
        tensors.sizes(header, {"f": Path(__file__)})


def test_names_of_files(tmp_path: Path) -> None:
    for name in ("x-00001-of-00000.gguf", "x-00004-of-00003.gguf"):
        with pytest.raises(MlcBuildError, match=rf"in/{name}: a part \d of \d: its name is not what it was"):
            checkpoint.parts(name, [name], "in/")
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(MlcBuildError, match=r"x.gguf: a folder with the name of a GGUF file: rename it"):
        checkpoint.local_parts(tmp_path / "x.gguf")
    with pytest.raises(MlcBuildError, match=r"config.json says quant_method gguf, and no file that ends in .gguf is"):
        checkpoint.read({})


def test_bounds_of_a_header() -> None:
    import struct

    begin = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"e" + struct.pack("<IIQ", 9, 4, 10_000_001)
    with pytest.raises(MlcBuildError, match="f: a list of 10,000,001 values; at most 10,000,000 are read"):
        parse(begin, "f")
    with pytest.raises(MlcBuildError, match="f: its header goes on after 268,435,456 bytes: it is damaged"):
        parse(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 40), "f")


def test_which_file_of_a_repository() -> None:
    names = ["README.md", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-m-Q4_K_M.gguf", "a/m-Q8_0-00001-of-00002.gguf",
             "a/m-Q8_0-00002-of-00002.gguf", "b-m-F16.gguf", "m-F16.gguf"]  # fmt: skip
    assert repository.chosen(names, "q4_k_m", "hf:o/n") == ["m-Q4_K_M.gguf"]
    assert repository.chosen(names, "Q8_0", "hf:o/n") == names[4:6]
    assert repository.chosen(names, "m-Q4_K_S.gguf", "hf:o/n") == ["m-Q4_K_S.gguf"]
    with pytest.raises(MlcBuildError, match="hf:o/n: no GGUF file is `Q2_K`, or says so; there are: a/m-Q8_0-00001"):
        repository.chosen(names, "Q2_K", "hf:o/n")
    with pytest.raises(MlcBuildError, match=r"hf:o/n: `F16` may be b-m-F16.gguf or m-F16.gguf: write the whole name"):
        repository.chosen(names, "F16", "hf:o/n")


def test_shortest_numbers() -> None:
    """A float32 of 0.000001 is 1e-06, as config.json has it."""
    import struct

    text = b"general.architecture"
    facts = struct.pack("<Q", len(text)) + text + struct.pack("<IQ", 8, 1) + b"x"
    facts += struct.pack("<Q", 1) + b"e" + struct.pack("<If", 6, 1e-6)
    header = parse(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + facts, "f")
    assert header.facts == {"general.architecture": "x", "e": 1e-06} and dataclasses.asdict(header)["tensors"] == {}
