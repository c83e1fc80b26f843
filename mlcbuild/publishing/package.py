"""One installed package as publishing sees it: what lies in dist/<recipe>/."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlcbuild.errors import MlcBuildError
from mlcbuild.regular import read_regular

_METADATA = b'{"model_type"'
PUBLISHED = "published.json"  # beside the manifest, once the package is on a hub: where


@dataclass(frozen=True)
class Package:
    """A folder of dist/, with its manifest, and what that says of the recipe and of its verification."""

    folder: Path
    manifest: Mapping[str, Any]
    recipe: str
    model: str
    quantization: Mapping[str, Any]
    target: Mapping[str, Any]
    quality: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether verification has found it good enough; not so where a miss was only recorded."""
        return self.quality.get("status") in ("passed", "warned")

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each file, by name in the folder."""
        return {name: file["sha256"] for name, file in self.manifest["files"].items()}

    @property
    def weights(self) -> Path:
        """The folder that is uploaded as it is; its name is the repository's."""
        name = next(str(name) for name in self.manifest["files"] if name.endswith("/mlc-chat-config.json"))
        return self.folder / name.rpartition("/")[0]

    @property
    def library(self) -> Path:
        plain = (str(name) for name in self.manifest["files"] if "/" not in name)
        return self.folder / next(name for name in plain if name != "quality.json")

    @property
    def weights_tree(self) -> str:
        """The digest of the weights: packages for other targets have the same."""
        return str(self.manifest["steps"]["quantize"]["tree"])

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """mlc-chat-config.json."""
        found: Mapping[str, Any] = json.loads((self.weights / "mlc-chat-config.json").read_bytes())
        return found

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the library says of itself; it lies in the file as JSON. Raises MlcBuildError where it does not."""
        with self.library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(_METADATA)
            end = data.find(b"\0", start)
            text = data[start : end if end > 0 else len(data)].decode(errors="replace") if start >= 0 else ""
        try:
            found: Mapping[str, Any] = json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            raise MlcBuildError(f"{self.library}: no `_metadata` in it that could be read") from None
        return found

    @cached_property
    def published(self) -> Mapping[str, Any] | None:
        """Where the package is on a hub; None while it is nowhere."""
        try:
            found: Mapping[str, Any] = json.loads(read_regular(self.folder / PUBLISHED))
        except (OSError, ValueError):
            return None
        return found


def read_package(folder: Path) -> Package:
    """The package installed in `folder`. Raises MlcBuildError where there is none."""
    try:
        manifest = json.loads(read_regular(folder / "manifest.json"))
    except (OSError, ValueError):
        raise MlcBuildError(f"{folder}: no installed package: doit build recipe={folder.name}") from None
    recipe = manifest["recipe"]
    return Package(
        folder,
        manifest,
        recipe=recipe["name"],
        model=recipe["model"]["name"],
        quantization=recipe["quantization"],
        target=recipe["target"],
        quality=manifest["quality"],
    )


def installed(dist: Path) -> list[Package]:
    """All packages in dist/, by recipe."""
    folders = sorted(path.parent for path in dist.glob("*/manifest.json") if not path.parent.name.startswith("."))
    return [read_package(folder) for folder in folders]
