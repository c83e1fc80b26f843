"""Where each parameter of a model lies in its checkpoint: the content of `parameters.json`.

    {"version": 1, "parameters": [{"name", "shape", "dtype",
        "parts": [{"blob": sha256, "file", "tensor", "offset", "nbytes", "shape"}, ...]}, ...]}

A part is a contiguous, row-major piece of a checkpoint file; the parts, one after the other, are the parameter. `file`
and `tensor` are the names a user knows, for messages.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, same_bytes
from mlcbuild.errors import CheckpointError, under
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.tied import HEADS, tied_embedding

_NAMED = 12  # how many missing or unexpected tensors a message names one by one
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Names:
    """Tensor names on both sides: those the model needs, and those the checkpoint has."""

    needed: Collection[str]
    present: Collection[str]

    def layers(self, names: Collection[str]) -> set[int]:
        return {int(match[1]) for match in map(_LAYER.search, names) if match}


def with_prefix(
    table: Mapping[str, TensorRef],
    prefix: str,
    wanted: Collection[str],
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, TensorRef]:
    """The table by the names that are wanted, where the checkpoint leaves their common prefix out, or alone has one.

    `prefix` is one that the architecture's files may lack. Any other is one for all tensors, where not a single name is
    known without it: a wrapper's (`_orig_mod.`, `module.`), or `model.` where AutoModel saved the file; `note` says so.
    """
    if prefix and not any(name.startswith(prefix) for name in wanted):
        table = {name.removeprefix(prefix): ref for name, ref in table.items()}
    elif prefix and not any(name.startswith(prefix) for name in table):
        stems = {name.rpartition(".")[0] for name in wanted}
        return {prefix + name if (prefix + name).rpartition(".")[0] in stems else name: r for name, r in table.items()}
    known = set(wanted)
    if not table or not known.isdisjoint(table):
        return dict(table)
    stripped = _without_wrapper(table, known)
    if stripped:
        note(f"all tensors begin with `{stripped}`, which is left out")
        return {name.removeprefix(stripped): ref for name, ref in table.items()}
    for added in sorted({f"{name.partition('.')[0]}." for name in known}):
        if all(added + name in known for name in table):
            note(f"the tensors lack `{added}` before their names, as AutoModel saves them; it is put there")
            return {added + name: ref for name, ref in table.items()}
    return dict(table)


def _without_wrapper(table: Mapping[str, TensorRef], known: Collection[str]) -> str:
    """The shortest beginning of all names behind which one is known; empty where there is none."""
    parts = next(iter(table)).split(".")
    for count in range(1, len(parts)):
        start = "".join(f"{part}." for part in parts[:count])
        if not all(name.startswith(start) for name in table):
            return ""
        if any(name.removeprefix(start) in known for name in table):
            return start
    return ""


def as_stored(parameters: Sequence[Parameter], table: Mapping[str, TensorRef]) -> tuple[Parameter, ...]:
    """The parameters with the sources that the checkpoint has: the alternative's, where only that one is there."""
    return tuple(
        replace(each, sources=each.alternative, alternative=())
        if each.alternative and all(name in table for name in each.alternative) and each.sources[0] not in table
        else each
        for each in parameters
    )


def index(
    parameters: Sequence[Parameter],
    table: Mapping[str, TensorRef],
    ignored: Collection[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The content of `parameters.json`: each parameter's `sources`, joined along axis 0.

    `ignored` tensors may be present and are dropped; `*` in a name is any text. So is an `lm_head.weight` of a model
    without one (tied embeddings), if its bytes are the embedding's; `note` then says so. Raises CheckpointError with
    all problems: tensors that are missing, of a wrong shape or dtype, or that belong to no parameter.
    """
    needed = {source for parameter in parameters for source in parameter.sources}
    names = Names(needed, table.keys())
    repeated, problems = _tied(parameters, table, needed, note)
    wild = [pattern for pattern in ignored if "*" in pattern]
    dropped = {name for name in table if any(fnmatchcase(name, pattern) for pattern in wild)}
    problems += _missing(names) + _unexpected(names, {*ignored, *repeated, *dropped})
    entries = []
    for parameter in parameters:
        refs = [table[source] for source in parameter.sources if source in table]
        if len(refs) == len(parameter.sources):
            problems += _mismatches(parameter, refs)
        entries.append(entry(parameter, refs))
    if problems:
        raise CheckpointError("\n".join(problems))
    return {"version": 1, "parameters": entries}


def entry(parameter: Parameter, refs: Sequence[TensorRef]) -> dict[str, Any]:
    """A parameter of parameters.json that consists of these tensors."""
    return {
        "name": parameter.name,
        "shape": list(parameter.shape),
        "dtype": FLOATS[refs[0].dtype][0] if refs and refs[0].dtype in FLOATS else None,
        "parts": [part(ref) for ref in refs],
    }


def part(ref: TensorRef) -> dict[str, Any]:
    """A tensor of a file as a parameter of parameters.json refers to it."""
    return {
        "blob": ref.blob,
        "file": ref.file,
        "tensor": ref.name,
        "offset": ref.offset,
        "nbytes": ref.nbytes,
        "shape": list(ref.shape),
    }


def _mismatches(parameter: Parameter, refs: Sequence[TensorRef]) -> list[str]:
    if "by_expert" in parameter.convert and not any(ref.shape[0] % parameter.shape[0] for ref in refs):
        shapes = [(parameter.shape[0], ref.shape[0] // parameter.shape[0], *ref.shape[1:]) for ref in refs]
        joined = (*shapes[0][:1], sum(shape[1] for shape in shapes), *shapes[0][2:])
        refs = [replace(refs[0], shape=joined)] if len({shape[2:] for shape in shapes}) == 1 else refs
    if "differential" in parameter.convert and {len(ref.shape) for ref in refs} == {1}:
        refs = [replace(refs[0], shape=parameter.shape)] if len({ref.shape for ref in refs}) == 1 else refs
    expected = parameter.stored
    if {"first_rows", "last_rows"} & {*parameter.convert}:
        refs = [replace(ref, shape=(min(ref.shape[0], parameter.shape[0]), *ref.shape[1:])) for ref in refs]
    refs = [replace(ref, shape=parameter.joined(ref.shape)) for ref in refs]
    if "transpose" in parameter.convert:
        refs = [replace(ref, shape=(*ref.shape[:-2], *ref.shape[:-3:-1])) for ref in refs]
    problems = [
        f"{ref.file}: tensor {ref.name}: dtype {ref.dtype}, expected one of {', '.join(FLOATS)}"
        for ref in refs
        if ref.dtype not in FLOATS
    ]
    if not problems and any(ref.dtype != refs[0].dtype for ref in refs):
        found = ", ".join(f"{ref.name} {ref.dtype}" for ref in refs)
        problems.append(f"{refs[0].file}: the parts of {parameter.name} have different dtypes: {found}")
    if _fits(expected, [ref.shape for ref in refs]):
        return problems
    if len(refs) == 1:
        ref = refs[0]
        problems.append(
            f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}{_turned(parameter)}, but config.json makes it "
            f"{list(expected)}"
        )
    else:
        named = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in refs)
        files = ", ".join(sorted({ref.file for ref in refs}))
        problems.append(
            f"{files}: {named}: joined by rows they are not the {list(parameter.shape)} "
            f"that config.json makes of {parameter.name}"
        )
    return problems


def _fits(shape: tuple[int, ...], given: Sequence[tuple[int, ...]]) -> bool:
    """Whether tensors of the shapes `given`, one after the other, are a parameter: rows of it, its experts or heads."""
    given = [each[1:] if each[:1] == (1,) and len(each) == len(shape) + 1 else each for each in given]  # one vector
    if len(shape) > 1 and all(len(each) == len(shape) - 1 for each in given):
        per_expert = len(given) // shape[0]
        return len(given) == per_expert * shape[0] and all(
            _fits(shape[1:], given[start : start + per_expert]) for start in range(0, len(given), per_expert)
        )
    rests = [each[1:] for each in given if len(each) == len(shape)]
    return rests == [shape[1:]] * len(given) and sum(each[0] for each in given) == shape[0]


def _turned(parameter: Parameter) -> str:
    return " once transposed" if "transpose" in parameter.convert else ""


def _missing(names: Names) -> list[str]:
    missing = [name for name in sorted(names.needed, key=_natural) if name not in names.present]
    if not missing:
        return []
    here, wanted = names.layers(names.present), names.layers(names.needed)
    absent = [name for name in missing if names.layers([name]) - here] if here and wanted - here else []
    problems = []
    if absent:
        problems.append(
            f"config.json says num_hidden_layers {max(wanted) + 1}, but the checkpoint has tensors of "
            f"{len(here)} layers only ({_span(here)}): missing are {_list(absent)}"
        )
    spare = [name for name in names.present if name not in names.needed]
    single = [name for name in missing if name not in set(absent)]
    for name in single[:_NAMED]:
        near = difflib.get_close_matches(name, spare[:1000], n=1, cutoff=0.8)
        problems.append(f"tensor {name} is missing from the checkpoint" + (f"; it has {near[0]}" if near else ""))
    if len(single) > _NAMED:
        problems.append(f"and {len(single) - _NAMED} more tensors are missing from the checkpoint{under(single)}")
    return problems


def _unexpected(names: Names, allowed: Collection[str]) -> list[str]:
    extra = [name for name in sorted(names.present, key=_natural) if name not in names.needed and name not in allowed]
    if not extra:
        return []
    wanted = names.layers(names.needed)
    beyond = [name for name in extra if wanted and any(layer > max(wanted) for layer in names.layers([name]))]
    problems = []
    if beyond:
        layers = names.layers(beyond)
        problems.append(
            f"config.json says num_hidden_layers {max(wanted) + 1}, but the checkpoint has tensors of "
            f"layer{'s' if len(layers) > 1 else ''} {_span(layers)}: {_list(beyond)}"
        )
    single = [name for name in extra if name not in set(beyond)]
    absent = [name for name in names.needed if name not in names.present]
    for name in single[:_NAMED]:
        near = difflib.get_close_matches(name, absent[:1000], n=1, cutoff=0.8)
        hint = f"; did it mean {near[0]}?" if near else ": the architecture has no use for it"
        problems.append(f"the checkpoint has a tensor {name} that belongs to no parameter{hint}")
    if len(single) > _NAMED:
        problems.append(f"and {len(single) - _NAMED} more tensors belong to no parameter{under(single)}")
    return problems


def _tied(
    parameters: Sequence[Parameter],
    table: Mapping[str, TensorRef],
    needed: Collection[str],
    note: Callable[[str], None],
) -> tuple[list[str], list[str]]:
    """Names of stored output matrices that belong to a tied embedding, and problems: that they do not repeat it."""
    embedding, heads = tied_embedding(parameters), [table[n] for n in HEADS if n in table and n not in needed]
    if not heads or embedding is None:
        return [], []
    head = heads[0]
    source = table.get(embedding)
    if source is None:
        return [head.name], []  # that the embedding is missing is the problem to report
    if (head.shape, head.dtype) != (source.shape, source.dtype) or not same_bytes(head, source):
        problem = (
            f"{head.file}: tensor {head.name} differs from {source.name}, although config.json says "
            "tie_word_embeddings: true; set it to false in config.json if the model has an output matrix of its own"
        )
        return [head.name], [problem]
    note(f"{head.name} repeats {source.name} (tie_word_embeddings is true) and is left out")
    return [head.name], []


def _span(layers: Collection[int]) -> str:
    """`0 to 3`, or `0, 2, 5` when there are gaps."""
    ordered = sorted(layers)
    if len(ordered) > 2 and ordered[-1] - ordered[0] + 1 == len(ordered):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _natural(name: str) -> list[Any]:
    """A sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
