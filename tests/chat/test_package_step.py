"""The step package: the files of a package, and mlc-chat-config.json field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat.compare import check
from mlcbuild.chat.config import chat_config
from mlcbuild.chat.conversation import from_data
from mlcbuild.chat.tokenizer_info import json_tokenizer
from mlcbuild.engine.job import Job, local_job
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.load import load
from mlcbuild.steps import package
from tests.chat import chats
from tests.chat.sentencepieces import sentencepiece_model

MODEL_CONFIG = {
    "hidden_size": 64,
    "vocab_size": 320,
    "context_window_size": 512,
    "prefill_chunk_size": 256,
    "tensor_parallel_shards": 1,
}
TEMPLATE = {"name": "chatml", "roles": {"user": "U", "assistant": "A"}, "seps": ["\n"]}
TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 2, "content": "<end>"}],
    "decoder": {"type": "ByteLevel"},
}
TEMPLATES = load(Path(__file__).parents[2]).templates
FIELDS = {
    "model": "tiny",
    "quantization": "q4f16_1",
    "format": "q4f16_1",
    "target": "cpu",
    "template": TEMPLATE,
    "model_type": "llama",
    "model_config": MODEL_CONFIG,
}


def job(folder: Path, checkpoint: dict[str, Any], **fields: Any) -> Job:
    """`checkpoint` has the content of its files: JSON, or bytes as they are."""
    files = {
        "quantize": {"params_shard_0.bin": b"weights", "tensor-cache.json": b"{}"},
        "library": {"model.so": b"library"},
        "checkpoint": {
            name: content if isinstance(content, bytes) else json.dumps(content).encode()
            for name, content in checkpoint.items()
        },
    }
    for name, contents in files.items():
        (folder / name).mkdir()
        for file, data in contents.items():
            (folder / name / file).write_bytes(data)
    return local_job({name: folder / name for name in files}, {**FIELDS, **fields}, folder / "job")


def written(folder: Path, checkpoint: dict[str, Any], **fields: Any) -> dict[str, Any]:
    made = job(folder, checkpoint, **fields)
    package.run(made)
    config: dict[str, Any] = json.loads((made.output / "tiny-q4f16_1-MLC" / "mlc-chat-config.json").read_text())
    return config


def test_the_files_of_a_package(tmp_path: Path) -> None:
    checkpoint = {"tokenizer.json": TOKENIZER, "config.json": {}, "tokenizer_config.json": {}, "merges.txt": ""}
    made = job(tmp_path, checkpoint)
    package.run(made)
    weights = made.output / "tiny-q4f16_1-MLC"
    assert sorted(path.name for path in weights.iterdir()) == [
        "merges.txt",
        "mlc-chat-config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    reused = {name: entry.path.name for name, entry in made.reused.items()}
    assert reused == {
        "tiny-q4f16_1-MLC/params_shard_0.bin": "params_shard_0.bin",
        "tiny-q4f16_1-MLC/tensor-cache.json": "tensor-cache.json",
        "tiny-q4f16_1-MLC/ndarray-cache.json": "tensor-cache.json",
        "tiny-q4f16_1-cpu.so": "model.so",
    }
    config = json.loads((weights / "mlc-chat-config.json").read_text())
    assert config["tokenizer_files"] == ["tokenizer.json", "merges.txt", "tokenizer_config.json"]


def test_every_field_in_mlcs_order(tmp_path: Path) -> None:
    config = written(tmp_path, {"tokenizer.json": TOKENIZER})
    assert list(config) == [
        *("version", "model_type", "quantization", "model_config", "vocab_size", "context_window_size"),
        *("sliding_window_size", "prefill_chunk_size", "attention_sink_size", "tensor_parallel_shards"),
        *("pipeline_parallel_stages", "active_vocab_size", "temperature", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "top_p", "tokenizer_files", "tokenizer_info", "conv_template", "pad_token_id"),
        *("bos_token_id", "eos_token_id", "model_task", "embedding_metadata"),
    ]
    assert config["model_config"] == MODEL_CONFIG
    expected = {
        "version": "0.1.0",
        "vocab_size": 320,
        "active_vocab_size": 3,
        "context_window_size": 512,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "temperature": 1.0,
        "top_p": 1.0,
        "bos_token_id": 1,
        "eos_token_id": [],
        "model_task": "chat",
        "embedding_metadata": None,
    }
    assert {key: config[key] for key in expected} == expected


def test_the_checkpoints_own_sampling_defaults(tmp_path: Path) -> None:
    """generation_config.json first, config.json after it; null says nothing."""
    config = written(
        tmp_path,
        {
            "tokenizer.json": TOKENIZER,
            "generation_config.json": {"temperature": 0.6, "top_p": None, "eos_token_id": [5, 6], "top_k": 20},
            "config.json": {"temperature": 0.1, "top_p": 0.9, "bos_token_id": 4, "pad_token_id": None},
        },
    )
    expected = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "bos_token_id": 4, "pad_token_id": 0}
    assert {key: config[key] for key in expected} == expected
    assert "top_k" not in config


def test_a_checkpoint_with_tokenizer_model_only(tmp_path: Path) -> None:
    """The tokenizer's size and its treatment of spaces come from the SentencePiece model itself."""
    model = sentencepiece_model(tmp_path).read_bytes()
    files = {"tokenizer.model": model, "added_tokens.json": {"<pad>": 330}}
    config = written(tmp_path, files, model_config={**MODEL_CONFIG, "vocab_size": 352})
    assert config["tokenizer_files"] == ["tokenizer.model", "added_tokens.json"]
    assert config["active_vocab_size"] == 331
    assert config["tokenizer_info"] == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }


def test_tokens_that_the_model_has_no_row_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma 3 (1B) has one, for images: never sampled, and said."""
    notes: list[str] = []
    monkeypatch.setattr(Job, "note", lambda _, text: notes.append(text))
    added = {"added_tokens": [*TOKENIZER["added_tokens"], {"id": 320, "content": "<image>"}]}
    config = written(tmp_path, {"tokenizer.json": {**TOKENIZER, **added}})
    assert config["active_vocab_size"] == 320
    assert [note[:62] for note in notes] == ["the tokenizer has tokens up to 320, but the model has 320 rows"]


def test_an_end_of_text_that_the_model_has_no_row_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Job, "note", lambda _, text: notes.append(text))
    written(tmp_path, {"tokenizer.json": TOKENIZER, "config.json": {"eos_token_id": [2, 99999]}})
    assert notes == ["a text ends at token 99999, say the configs, but the model has 320 rows and never writes it"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"added_tokens": [{"content": "x"}]}, "tokenizer.json: not a tokenizer's: KeyError: 'id'"),
        ({"model": {"vocab": {"a": "0"}}}, "tokenizer.json: the id of token 'a' is '0', expected a whole number"),
        ({"model": {"vocab": [[]]}}, "tokenizer.json: not a tokenizer's: IndexError: list index out of range"),
        ({"model": []}, "tokenizer.json: not a tokenizer's: AttributeError: 'list' object has no attribute 'get'"),
    ],
)
def test_a_tokenizer_that_is_none(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MlcBuildError) as error:
        written(tmp_path, {"tokenizer.json": {**TOKENIZER, **changes}})
    assert str(error.value) == problem


def test_a_sampling_default_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match="temperature is 'hot', expected a number"):
        written(tmp_path, {"tokenizer.json": TOKENIZER, "generation_config.json": {"temperature": "hot"}})


@pytest.mark.parametrize("value", ["0", 1.5, True, [0, "1"], []])
def test_an_end_of_text_that_is_no_token(tmp_path: Path, value: Any) -> None:
    with pytest.raises(MlcBuildError, match=r"config.json: eos_token_id is .*, expected the id of a token, or a list"):
        written(tmp_path, {"tokenizer.json": TOKENIZER, "config.json": {"eos_token_id": value}})


def test_the_template_that_the_tokenizer_brings(tmp_path: Path) -> None:
    """`template: auto`: chat_template.jinja where there is one, else tokenizer_config.json."""
    tokens = [{"id": i, "content": text, "special": True} for i, text in enumerate(chats.SPECIAL)]
    checkpoint = {
        "tokenizer.json": {"model": {"vocab": {}}, "added_tokens": tokens},
        "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": chats.VICUNA},
        "generation_config.json": {"eos_token_id": [1, 4]},
    }
    for name in ("config", "jinja"):
        (tmp_path / name).mkdir()
    template = written(tmp_path / "config", checkpoint, template={"name": "auto"})["conv_template"]
    assert (template["roles"]["user"], template["seps"]) == ("USER", [" ", "</s>"])
    assert (template["system_prefix_token_ids"], template["stop_token_ids"]) == ([0], [1, 4])
    checkpoint["chat_template.jinja"] = chats.CHATML.encode()
    template = written(tmp_path / "jinja", checkpoint, template={"name": "auto"})["conv_template"]
    assert template["roles"]["user"] == "<|im_start|>user"
    # Kept for verification, and for whoever opens the folder with transformers.
    assert (tmp_path / "jinja" / "job" / "output" / "tiny-q4f16_1-MLC" / "chat_template.jinja").is_file()


def test_the_special_tokens_of_an_older_file(tmp_path: Path) -> None:
    """FAULTS A8: special_tokens_map.json names them where tokenizer_config.json has no added_tokens_decoder."""
    tokens = [{"id": i, "content": text, "special": True} for i, text in enumerate(chats.SPECIAL)]
    checkpoint: dict[str, Any] = {
        "tokenizer.json": {"model": {"vocab": {}}, "added_tokens": tokens},
        "tokenizer_config.json": {"chat_template": chats.VICUNA},
        "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
    }
    for name in ("older", "newer"):
        (tmp_path / name).mkdir()
    config = written(tmp_path / "older", checkpoint, template={"name": "auto"})
    assert (config["conv_template"]["system_prefix_token_ids"], config["conv_template"]["stop_token_ids"]) == ([0], [1])
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    weights = tmp_path / "older" / "job" / "output" / "tiny-q4f16_1-MLC"
    report = check(from_data("auto", config["conv_template"]), weights)[0].report
    assert report["checked"] and "differs" not in report
    checkpoint["tokenizer_config.json"] |= {"added_tokens_decoder": {}, "bos_token": "<s>"}
    config = written(tmp_path / "newer", checkpoint, template={"name": "chatml", **TEMPLATE})
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, [])


@pytest.mark.parametrize(
    ("config", "ids"),
    [({}, (2, 1)), ({"bos_token_id": None, "eos_token_id": None}, (2, 1)), ({"eos_token_id": 0}, (2, 0))],
)
def test_ends_of_text_that_only_the_tokenizer_names(tmp_path: Path, config: dict[str, Any], ids: Any) -> None:
    """FAULTS A10: the tokenizer's; MLC's default, 2, is one of llama's."""
    checkpoint = {
        "tokenizer.json": TOKENIZER,
        "tokenizer_config.json": {"bos_token": "<end>", "eos_token": "b"},
        "config.json": config,
    }
    found = written(tmp_path, checkpoint)
    assert (found["bos_token_id"], found["eos_token_id"]) == ids


_BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}


@pytest.mark.parametrize(
    ("tokenizer", "config", "begin", "end"),
    [
        ({"post_processor": _BOS_FIRST}, {}, [2], [1]),
        ({"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, _BOS_FIRST]}}, {}, [2], [1]),
        ({"post_processor": _BOS_FIRST}, {"add_bos_token": False}, None, [1]),
        ({}, {"add_bos_token": True}, [2], [1]),
        ({}, {"eos_token": None}, None, []),
    ],
)
def test_text_as_it_is_begins_and_ends_as_the_checkpoint_says(
    tmp_path: Path, tokenizer: dict[str, Any], config: dict[str, Any], begin: list[int] | None, end: list[int]
) -> None:
    """FAULTS A9: MLC's LM has llama's ids, which are a Gemma's the other way round."""
    tokens = [{"id": i, "content": text, "special": True} for i, text in enumerate(("<pad>", "<eos>", "<bos>"))]
    files = {
        "tokenizer.json": {"model": {"vocab": {}}, "added_tokens": tokens, **tokenizer},
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": "<eos>", **config},
    }
    template = written(tmp_path, files, template={"name": "LM", **TEMPLATES["LM"].data})["conv_template"]
    assert (template["system_prefix_token_ids"], template["stop_token_ids"]) == (begin, end)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"added_tokens.json": {"<|im_start|>": 300}},
            "added_tokens.json: token '<|im_start|>' is 300, which tokenizer.json lacks, and would cut into pieces",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<end>"}, "9": {"content": "a"}}}},
            "tokenizer_config.json: added_tokens_decoder: token 'a' is 9, which tokenizer.json has as 0",
        ),
    ],
)
def test_added_tokens_that_the_tokenizer_does_not_have(tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    """FAULTS A7: transformers adds them when it loads the tokenizer, MLC's runtimes read tokenizer.json alone."""
    with pytest.raises(MlcBuildError) as error:
        written(tmp_path, {"tokenizer.json": TOKENIZER, **files})
    assert str(error.value) == (
        f"{problem}: save the tokenizer again, with transformers' "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def test_auto_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match="template auto: the checkpoint has no chat_template"):
        written(tmp_path, {"tokenizer.json": TOKENIZER}, template={"name": "auto"})


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"tiny: the checkpoint has neither tokenizer.json nor tokenizer.model"):
        package.run(job(tmp_path, {"config.json": {}}))


def test_a_checkpoint_whose_config_is_a_list(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"generation_config.json: expected a JSON object, found \[1\]"):
        package.run(job(tmp_path, {"tokenizer.json": TOKENIZER, "generation_config.json": [1]}))


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made = job(tmp_path / name, {"tokenizer.json": TOKENIZER})
        package.run(made)
        texts.add((made.output / "tiny-q4f16_1-MLC" / "mlc-chat-config.json").read_bytes())
    assert len(texts) == 1


def test_config_needs_no_files() -> None:
    tokenizer = json_tokenizer(TOKENIZER)
    config = chat_config("llama", "q0f32", MODEL_CONFIG, from_data("x", TEMPLATE), tokenizer, ["tokenizer.json"])
    assert config["conv_template"]["name"] == "x"
