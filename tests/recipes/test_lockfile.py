"""recipes.lock: written, read back, and refused when it is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.errors import RecipeError
from mlcbuild.recipes.lockfile import entry, lock_path, read_lock, write_lock
from mlcbuild.recipes.types import Locked, LockedFile, Source

ADVICE = "; restore the file from version control, or delete it: the next build resolves every repository again"
LOCKED = Locked(
    commit="0123456789abcdef0123456789abcdef01234567",
    config={"model_type": "llama", "hidden_size": 64},
    files={"config.json": LockedFile("ab" * 32, 512), "onnx/model.safetensors": LockedFile("cd" * 32, 4096)},
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    return tmp_path


def test_there_and_back(root: Path) -> None:
    assert read_lock(root) == {}
    write_lock(root, {"owner/b": LOCKED, "owner/a@v1": LOCKED})
    locked = read_lock(root)
    assert locked == {"owner/a@v1": LOCKED, "owner/b": LOCKED}
    assert entry(locked, Source(hf="owner/a", revision="v1")) == LOCKED
    assert entry(locked, Source(hf="owner/a")) is None
    assert [path.name for path in (root / "recipes").iterdir()] == ["recipes.lock"]


def test_the_text_depends_on_the_content_only_and_has_a_line_for_each_value(root: Path) -> None:
    write_lock(root, {"owner/b": LOCKED, "owner/a": LOCKED})
    text = lock_path(root).read_text()
    write_lock(root, dict(reversed(read_lock(root).items())))
    assert lock_path(root).read_text() == text
    assert '\n    "commit": "0123456789abcdef0123456789abcdef01234567",\n'.replace("    ", "   ") in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON: Expecting value"),
        ('{"version": 1,\n<<<<<<< HEAD\n', "2:1: not valid JSON: Expecting property name enclosed in double quotes"),
        (b"\xff", "not valid: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ('{"version": 1, "version": 1, "repos": {}}', "not valid: key `version` is repeated"),
        ("[" * 9999, "not valid: too many lists or objects in each other"),  # FAULTS.md D, found by tests/fuzz
        ("[]", "`version` is `null`, expected `1` and `repos`"),
        ('{"version": 2, "repos": {}}', "`version` is `2`, expected `1` and `repos`"),
    ],
)
def test_a_broken_file(root: Path, text: str | bytes, problem: str) -> None:
    lock_path(root).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(RecipeError) as error:
        read_lock(root)
    position = "" if problem[0].isdigit() else "1:1: "
    assert str(error.value) == f"recipes/recipes.lock:{position}{problem}{ADVICE}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"commit": "main"}, "`commit` is `main`, expected 40 hex digits"),
        ({"config": []}, "`config` is not the content of a config.json"),
        ({"files": {}}, "`files` names no file"),
        ({"files": {"a": {"sha256": "00", "size": 1}}}, 'file `a`: `sha256` is `"00"`, expected 64 hex digits'),
        ({"files": {"a": {"sha256": "ab" * 32, "size": -1}}}, "file `a`: `size` is `-1`, expected a number of bytes"),
        ({"files": {"a": {"sha256": "ab" * 32}}}, "file `a`: expected `sha256` and `size`"),
        ({"etag": 1}, "expected `commit`, `config` and `files`"),
        *[
            (
                {"files": {name: {"sha256": "ab" * 32, "size": 1}}},
                f"the file name `{name}` leads out of the checkpoint's folder",
            )
            for name in ("../a", "/etc/passwd", "a/../../b", "./a", "a//b", "a/")
        ],
    ],
)
def test_a_broken_entry(root: Path, change: dict[str, Any], problem: str) -> None:
    write_lock(root, {"owner/a": LOCKED})
    data = json.loads(lock_path(root).read_text())
    data["repos"]["owner/a"].update(change)
    lock_path(root).write_text(json.dumps(data))
    with pytest.raises(RecipeError) as error:
        read_lock(root)
    assert str(error.value) == f"recipes/recipes.lock:1:1: repository `owner/a`: {problem}{ADVICE}"


def test_a_failed_write_leaves_the_old_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock(root, {"owner/a": LOCKED})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_lock(root, {})
    assert read_lock(root) == {"owner/a": LOCKED}
    assert [path.name for path in (root / "recipes").iterdir()] == ["recipes.lock"]
