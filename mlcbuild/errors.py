"""Errors whose text is written for the user: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


def pointer(file: str) -> str:
    """What is said of a file that begins with POINTER."""
    return f"{file}: a Git LFS pointer and not the file itself: run `git lfs pull` in its folder"


POINTER = b"version https://git-lfs"  # what git has in a large file's place begins so


class MlcBuildError(Exception):
    """Something the user can act on; its text is shown without a traceback."""


class RecipeError(MlcBuildError):
    """Everything that is wrong with a set of recipe files, reported in one go."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(MlcBuildError):
    """A checkpoint's files do not hold what its config or its index promises."""


class StepFailed(MlcBuildError):
    """A step of the graph ended without an artifact."""


class NotLocked(MlcBuildError):
    """A repository has no entry in recipes.lock, so nothing is known of the model yet; the text names both."""


class Unavailable(MlcBuildError):
    """This machine lacks a tool that the recipe needs; nothing is wrong with the recipe itself."""
