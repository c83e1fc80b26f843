"""The vocabulary of RWKV's world models: from the checkpoint's file to the runtimes', and text both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlcbuild.chat import rwkv_vocabulary
from mlcbuild.chat.tokenizer_info import read_tokenizer
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime.tokenizer import load_tokenizer
from mlcbuild.steps import package
from tests.chat.test_package_step import job

# Every byte as itself; longer tokens, one of them half a character; a token with what some take for a line's end.
LINES = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)]
LINES += [
    "257 'th' 2",
    "258 'the' 3",
    "259 ' the' 4",
    "260 'ät' 3",
    r"261 b'\xe6\x97' 2",
    "262 '\u2028 ' 4",
    '263 "it\'s" 4',
]
TEXT = "the hät the 日本 it's\u2028 ok"


def greedy(text: str) -> list[int]:
    """The longest token at each byte, tried one by one."""
    tokens = {bytes([i]): i + 1 for i in range(256)}
    tokens |= {b"th": 257, b"the": 258, b" the": 259, "ät".encode(): 260, b"\xe6\x97": 261, "\u2028 ".encode(): 262}
    tokens[b"it's"] = 263
    data, ids = text.encode(), []
    while data:
        token = max((token for token in tokens if data.startswith(token)), key=len)
        ids.append(tokens[token])
        data = data[len(token) :]
    return ids


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8", newline="\n")
    return path


def test_text_becomes_the_longest_tokens_and_comes_back(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_model").write_bytes(rwkv_vocabulary.pack(rwkv_vocabulary.read_source(source)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == greedy(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0, 258]) == "the"  # the end of a text is no text
    assert tokenizer.token_to_id("the") == 258 and tokenizer.token_to_id("<|endoftext|>") == 0
    assert len(tokenizer.tokens()) == 264


def test_the_bytes_are_messagepack() -> None:
    """Written out from msgpack.org's specification."""
    assert rwkv_vocabulary.pack({1: b"a", 200: b"bc", 70000: b""}) == (
        b"\xdf\x00\x00\x00\x03" + b"\x01\xc4\x01a" + b"\xcc\xc8\xc4\x02bc" + b"\xce\x00\x01\x11\x70\xc4\x00"
    )


def test_what_other_writers_make_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_model"
    path.write_bytes(b"\x82" + b"\x01\xc4\x01a" + b"\xcd\x01\x00\xa2bc")  # a short map, a text instead of bytes
    assert rwkv_vocabulary.read(path) == {1: b"a", 256: b"bc"}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xdf\x00\x00\x00\x02\x01\xc4\x01a"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer_model"
    path.write_bytes(content)
    with pytest.raises(MlcBuildError, match="tokenizer_model: not a vocabulary of RWKV"):
        rwkv_vocabulary.read(path)


@pytest.mark.parametrize("line", ["3 'a'", "3 'a' 2", "1 'a' 1", "x 'a' 1", "3 a 1", "3 __import__('os') 2"])
def test_a_line_that_is_no_token_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_text(f"1 'b' 1\n{line}\n")
    with pytest.raises(MlcBuildError, match="line 2 is not `id literal length`"):
        rwkv_vocabulary.read_source(path)


def test_a_package_gets_the_file_that_the_runtimes_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    made = job(tmp_path / "step", {source.name: source.read_bytes(), "config.json": {}})
    package.run(made)
    folder = made.output / "tiny-q4f16_1-MLC"
    config = json.loads((folder / "mlc-chat-config.json").read_text())
    assert config["tokenizer_files"] == ["tokenizer_model"]
    assert config["active_vocab_size"] == 264
    assert load_tokenizer(folder).encode(TEXT) == greedy(TEXT)
    facts = read_tokenizer({path.name: path for path in folder.iterdir()})
    assert facts is not None and facts.special == {0} and facts.tokens["<|endoftext|>"] == 0
