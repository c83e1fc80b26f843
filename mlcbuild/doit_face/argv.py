"""The words of doit's command line: what must be known of them before there are tasks, or can be said better."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch

from mlcbuild.doit_face.groups import GROUPS, option_names
from mlcbuild.errors import MlcBuildError
from mlcbuild.recipes.problems import nearest
from mlcbuild.recipes.select import Selection

# doit's commands that run no task.
_SHOWING = ("clean", "completion", "dumpdb", "forget", "help", "ignore", "info", "list", "reset-dep", "tabcompletion")
# Kinds of tasks by what they are named for; the names of libraries say no model.
OF_RECIPES = ("build", "package", "verify", "publish")
OF_MODELS = ("download", "unpack", "convert", "calibrate", "round", "allocate", "quantize", "measure")
OF_LIBRARIES = ("lower", "runtime", "library", "execute")


def only_builds(words: Sequence[str]) -> bool:
    """Whether doit is asked for nothing but to build packages, as far as they need it."""
    rest = [word for word in words if "=" not in word or word.startswith("-")]
    return all(word in ("run", "build", "--continue", "-c") for word in rest)


def only_lists(words: Sequence[str]) -> bool:
    """Whether doit is asked for the names of tasks, and not for their states."""
    first = next((word for word in words if not word.startswith("-") and "=" not in word), None)
    short = [word[1:] for word in words if word.startswith("-") and not word.startswith("--")]
    return (
        first == "list"
        and not any("s" in letters for letters in short)
        and not any(word.startswith("--st") for word in words)
    )


def publishes(words: Sequence[str]) -> bool:
    """Whether tasks that publish are run."""
    return named_tasks(words).runs and any(word.partition(":")[0] == "publish" for word in words)


def named_tasks(words: Sequence[str]) -> Selection:
    """What the names of tasks select, and whether any are run."""
    words = [word for word in words if not word.startswith("-") and "=" not in word]
    first = next((word for word in words if word in _SHOWING or word in GROUPS or word == "run"), None)
    if first in _SHOWING:
        return Selection(whole=False)
    tasks = [word.partition(":") for word in words if word.partition(":")[0] in GROUPS]
    named = [(kind, name) for kind, colon, name in tasks if colon]
    return Selection(
        runs=True,
        whole=not tasks or len(named) < len(tasks),
        recipes=tuple(name for kind, name in named if kind in OF_RECIPES),
        models=tuple(name for kind, name in named if kind in OF_MODELS),
        others=any(kind in OF_LIBRARIES for kind, _ in named),
    )


def keeps_going(words: Sequence[str]) -> bool:
    """Whether a build with this command line goes on after a failure: unless it is told not to (`--no-continue`), or
    asks for one recipe or one step by its own name and is not told to (`--continue`)."""
    told = [word in ("--continue", "-c") for word in words if word in ("--continue", "-c", "--no-continue")]
    if told:
        return told[-1]
    recipes = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
    tasks = [word for word in words if ":" in word and "=" not in word and not word.startswith("-")]
    named = recipes[-1:] or tasks
    return len(named) != 1 or bool(set(named[0]) & set(",*?["))


def on_cluster(words: Sequence[str]) -> bool:
    """Whether doit's command line, or the environment, names a scheduler."""
    return bool(os.environ.get("MLCBUILD_SCHEDULER")) or any(word.startswith("scheduler=") for word in words)


def check_words(words: Sequence[str], tasks: Iterable[str], unavailable: Mapping[str, str]) -> None:
    """What doit does not say, or not in a sentence: it passes over a pattern that matches nothing, has no suggestions,
    and shows its own data where a task has no such option.

    `unavailable` says of recipes why they cannot be built here. Raises MlcBuildError.
    """
    _check_options(words)
    known = set(tasks)
    for word in words:
        kind, colon, name = word.partition(":")
        if not colon or kind not in GROUPS or "=" in word:
            continue
        if word in known or ("*" in word and any(fnmatch(task, word) for task in known)):
            continue
        if kind == "build" and name in unavailable:
            raise MlcBuildError(f"{name}: unavailable: {unavailable[name]}")
        close = nearest(word, [task for task in known if task.startswith(f"{kind}:")])
        hint = f": did you mean {close}?" if close else "; `doit list --all` shows the tasks"
        raise MlcBuildError(f"no task is called {word}{hint}")


def _check_options(words: Sequence[str]) -> None:
    """Behind the name of a task only its own options may stand. Raises MlcBuildError."""
    task, before = "", ""
    for number, word in enumerate(words if named_tasks(words).runs else ()):
        if word.partition(":")[0] in GROUPS and "=" not in word:
            task = word
        elif task and word.startswith("-") and before != "--log-json":
            takes = option_names(task)
            if not any(name == word or (word[1] == "-" and name.startswith(word.partition("=")[0])) for name in takes):
                example = " ".join(words[number : number + 2])
                raise MlcBuildError(
                    f"{task} has no option {word}, only {', '.join(takes)}. Options of doit stand before the task: "
                    f"`doit {example} {task}`"
                )
        before = word
