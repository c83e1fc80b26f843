"""What mlc-chat-config.json says of a tokenizer, read from tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.chat.tokenizer_info import read_tokenizer, tokenizer_info, unknown_stops, vocabulary
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.chat.sentencepieces import sentencepiece_model

# Pipelines as Llama 2's and Llama 3's tokenizer.json have them.
LLAMA_2 = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
LLAMA_3 = {"normalizer": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True}}


@pytest.mark.parametrize(
    ("tokenizer", "method", "prepend", "strip"),
    [
        (LLAMA_2, "byte_fallback", True, True),
        (LLAMA_3, "byte_level", False, False),
        ({"decoder": None}, "byte_fallback", False, False),
        ({"decoder": {"type": "WordPiece"}}, "byte_fallback", False, False),
        ({**LLAMA_3, "normalizer": {"type": "Prepend", "prepend": "▁"}}, "byte_level", True, False),
        (None, "byte_fallback", False, False),
    ],
)
def test_the_three_facts(tokenizer: Any, method: str, prepend: bool, strip: bool) -> None:
    assert tokenizer_info(tokenizer) == {
        "token_postproc_method": method,
        "prepend_space_in_encode": prepend,
        "strip_space_in_decode": strip,
    }


def bpe(folder: Path) -> Path:
    """A tokenizer.json with an added token inside the vocabulary and one behind it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(["a small text with a few small words"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_the_vocabulary_is_as_long_as_transformers_says(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    path = bpe(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert vocabulary(json.loads(path.read_text())) == theirs.get_vocab()
    ours = load_tokenizer(tmp_path)
    text = "a small text<|im_end|> with words"
    assert ours.tokens() == theirs.get_vocab()
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_unigram_vocabularies_are_lists() -> None:
    tokenizer = {"model": {"vocab": [["<unk>", 0.0], ["▁a", -1.0]]}, "added_tokens": [{"id": 2, "content": "<end>"}]}
    assert vocabulary(tokenizer) == {"<unk>": 0, "▁a": 1, "<end>": 2}


def test_a_token_that_is_added_twice() -> None:
    tokenizer = {"model": {"vocab": {}}, "added_tokens": [{"id": 1, "content": "<x>"}, {"id": 2, "content": "<x>"}]}
    with pytest.raises(MlcBuildError, match=r"tokenizer.json: added token '<x>' is listed twice"):
        vocabulary(tokenizer)


def test_stops_that_the_tokenizer_does_not_know() -> None:
    """`### Human` is text that a model writes; `<|eot_id|>` would have to be a token."""
    tokens = {"a": 0, "<|im_end|>": 1}
    assert unknown_stops([1], ["<|im_end|>", "### Human"], tokens) == []
    assert unknown_stops([7], ["<|eot_id|>", "</s>"], tokens) == [
        "stop token id 7 is not in the tokenizer (2 tokens)",
        "stop token `<|eot_id|>` is unknown to the tokenizer, which would cut it into pieces",
        "stop token `</s>` is unknown to the tokenizer, which would cut it into pieces",
    ]


def test_a_stop_id_that_is_an_ordinary_word() -> None:
    """chatml's stop token 2 is `<|im_end|>` where it was defined; with Qwen's tokenizer every `#` would end a reply."""
    tokens = {"a": 0, "<|im_end|>": 1, "#": 2}
    assert unknown_stops([2], ["<|im_end|>"], tokens, special={1}) == [
        "stop token id 2 is '#' in this tokenizer, not `<|im_end|>`: replies would end at an ordinary word"
    ]
    assert unknown_stops([1], ["<|im_end|>"], tokens, special={1}) == []


def test_stop_ids_that_are_pieces_of_a_separator() -> None:
    """minigpt ends turns with `###`, and stops at the tokens that it is written with."""
    tokens = {"▁###": 0, "##": 1, "the": 2, "</s>": 3}
    assert unknown_stops([0, 1], ["</s>"], tokens, {3}, written=("###",)) == []
    assert len(unknown_stops([2], ["</s>"], tokens, {3}, written=("###",))) == 1


def test_a_stop_string_that_is_never_written() -> None:
    """GPT-2 has no `</s>`, which MLC's template lists; its id 50256 ends replies, so nothing is wrong."""
    tokens = {"a": 0, "<|endoftext|>": 50256}
    assert unknown_stops([50256], ["</s>"], tokens, {50256}, written=("", "{user_message}")) == []
    assert unknown_stops([50256], ["</s>"], tokens, {50256}, written=("</s>",)) != []
    assert unknown_stops([], ["</s>"], tokens, {50256}, written=("",)) != []


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Path:
    """tokenizer.model without tokenizer.json, as in the Vicuna era."""
    sentencepiece_model(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 330}))
    return tmp_path


def test_a_sentencepiece_model(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    ids = tokenizer.encode("Once upon a time 🙂")
    assert ids[0] == tokenizer.token_to_id("<s>") == 1
    assert tokenizer.decode(ids) == "Once upon a time 🙂"
    assert tokenizer.encode("a<pad>sea", add_special_tokens=False).count(330) == 1
    assert tokenizer.token_to_id("nothing like it") is None
    (sentencepiece_folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    ids = load_tokenizer(sentencepiece_folder).encode("a")
    assert ids[0] != 1 and ids[-1] == tokenizer.token_to_id("</s>")


def test_the_facts_of_a_sentencepiece_model(sentencepiece_folder: Path) -> None:
    """They are those of the tokenizer.json that transformers would make of it, and of what the runtime reads."""
    facts = read_tokenizer({path.name: path for path in sentencepiece_folder.iterdir()})
    assert facts is not None
    assert facts.tokens == load_tokenizer(sentencepiece_folder).tokens()
    assert {facts.text(i) for i in facts.special} == {"<unk>", "<s>", "</s>", "<pad>"}
    assert facts.info == tokenizer_info(LLAMA_2)


def test_a_sentencepiece_model_that_adds_no_space(tmp_path: Path) -> None:
    facts = read_tokenizer({"tokenizer.model": sentencepiece_model(tmp_path, add_dummy_prefix=False)})
    assert facts is not None
    assert facts.info == tokenizer_info(None)


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    assert read_tokenizer({"config.json": tmp_path / "config.json"}) is None
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"x")
    with pytest.raises(MlcBuildError, match=r"tokenizer.model: not a SentencePiece model"):
        read_tokenizer({"tokenizer.model": path})


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"no tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(MlcBuildError, match=r"tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MlcBuildError, match=r"tokenizer.json: not a tokenizer file"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_a_training_run_are_ignored(tmp_path: Path) -> None:
    path = bpe(tmp_path)
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(JsonTokenizer(path).encode("a small text with a few words")) > 3
