"""The groups of tasks that a user may ask for: `doit build`, `doit quantize` ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from doit.task import Task

GROUPS = {
    "build": "build packages into dist/",
    "download": "fetch checkpoints",
    "unpack": "make checkpoints of llama.cpp's files",
    "convert": "bring checkpoints under the model's parameter names",
    "calibrate": "measure what the model's matrices are multiplied with",
    "round": "round matrices layer by layer, each to what the layers before it make",
    "allocate": "choose the format of each kind of matrix, for quantizations that are budgets",
    "quantize": "make the weights only",
    "lower": "make optimised modules",
    "runtime": "compile TVM's runtime for browsers",
    "library": "make the libraries only",
    "execute": "run the kernels of GPU libraries, on a GPU or on an emulated one",
    "package": "put weights, tokenizer and library together",
    "measure": "compare weights with the unquantized model",
    "verify": "check packages by what was measured",
    "publish": "upload verified packages to a hub; upload=1, without it only say what would be uploaded",
}
ALWAYS = {
    "name": "always",
    "short": "a",
    "long": "always-execute",
    "type": bool,
    "default": False,
    "help": "run the steps even if the cache has them",
}
LOG_JSON = {
    "name": "log_json",
    "long": "log-json",
    "type": str,
    "default": "",
    "help": "append one JSON object per event to this file (also: log_json=FILE, or MLCBUILD_LOG_JSON)",
}


def groups(members: Mapping[str, Sequence[str]]) -> list[Task]:
    """A task for each kind, with the tasks in it."""
    return [
        Task(kind, None, task_dep=list(members.get(kind, ())), has_subtask=True, doc=doc, params=[ALWAYS, LOG_JSON])
        for kind, doc in GROUPS.items()
    ]


def option_names(task: str) -> list[str]:
    """The options that the task, or group of tasks, called `task` has."""
    options = [ALWAYS] if ":" in task else [ALWAYS, LOG_JSON]
    return [f"-{option['short']}" for option in options if "short" in option] + [f"--{o['long']}" for o in options]
