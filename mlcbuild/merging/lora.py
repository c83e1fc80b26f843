"""Base + LoRA adapter (mlcbuild.merging.adapter reads it).

    W' = W + scale · B A        A [r, in], B [out, r]; scale = alpha / r, or alpha / sqrt(r) with `use_rslora`
    E' = E + scale · (B A)ᵀ     of an embedding: A [r, tokens], B [dim, r]

(Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; names: huggingface/peft.) With
`fan_in_fan_out` W is stored [in, out] and the product is transposed. A module that was trained as a whole
(`modules_to_save`) takes the place of the base's. Products are summed rank by rank in float32 and not by a matrix
library, whose order of summation depends on the machine: the same inputs shall give the same bytes.

Where the base ties its output matrix to the embedding, PEFT trains the two apart, and what is built is what
`merge_and_unload` leaves, once saved and read again (peft 0.21). Modules saved as wholes make them two, unless
`ensure_weight_tying`: planning knows that from the configuration, and the structure has both. Factors alone are all
added to the one tensor: that is another model than the one that was trained, and a note says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.checkpoints.computed import Computed, row_pieces
from mlcbuild.checkpoints.header import TensorRef
from mlcbuild.checkpoints.mapped import FLOATS, same_bytes, view
from mlcbuild.errors import CheckpointError
from mlcbuild.merging.adapter import CONFIG, Adapter, Parts, absent, sort
from mlcbuild.models.parameters import Parameter
from mlcbuild.models.tied import HEADS
from mlcbuild.quantization import floats

_TOGETHER = (
    "the adapter has factors of {}, and the base's output matrix is its embedding (tie_word_embeddings): as PEFT "
    "merges them, they change both, which is another model than the one that was trained; to keep that one, train on "
    "a base with an output matrix of its own"
)


@dataclass(frozen=True)
class _Product:
    """What is added to one tensor: `scale · left[:, k] right[k, :]`, summed over k.

    `left` [rows, r], `right` [r, columns].
    """

    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32]
    scale: float


def merged(
    adapter: Adapter,
    base: Mapping[str, TensorRef],
    needed: Collection[str],
    tied: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Computed]:
    """The tensors of `base` that the adapter changes, and how; `tied` is its embedding, if that is the output matrix.

    `note` is told where merging gives another model than the one that was trained.

    Raises CheckpointError for an adapter that changes a tensor which the model does not have, or one of another
    shape, that was made from another base, or whose saved modules untie `tied`; for tensors in it that are no LoRA
    factors and no saved modules, and for modules that its configuration names and it lacks.
    """
    problems: list[str] = []
    parts = sort(adapter, problems)
    if not problems:
        problems += absent(adapter, parts, [name.removesuffix(".weight") for name in needed])
    shared = set[str]()  # modules with factors, of the tensor that is embedding and output matrix in one
    if tied is not None and tied in base:
        parts, shared = _as_one(parts, base, needed, base[tied], problems)
        if shared:
            note(_TOGETHER.format(" and ".join(sorted(shared))))
    for module, ref in parts.copies.items():
        target = _target(module, base, needed, problems)
        if target is not None:
            problems += _difference(ref, target)
    made: dict[str, Computed] = {}
    products: dict[str, list[_Product]] = {}
    for module, factors in parts.factors.items():
        target = base[tied] if module in shared and tied else _target(module, base, needed, problems)
        if target is not None:
            found = _product(adapter, module, factors, target, problems)
            if found is not None:
                products.setdefault(target.name, []).append(found)
                made[target.name] = Computed(target, partial(_sums, target, products[target.name]))
    for module, ref in parts.saved.items():
        target = _target(module, base, needed, problems)
        if target is None:
            continue
        if target.name in made:
            problems.append(f"{ref.file}: tensor {ref.name}: the module is both trained as a whole and by factors")
        elif target.shape != ref.shape:
            problems.append(_misshapen(ref, target))
        else:
            made[target.name] = Computed(target, partial(_copies, ref, target.dtype))
    if not adapter.table and not problems:
        problems.append("the adapter has no tensors")
    if problems:
        raise CheckpointError("\n".join(f"lora: {problem}" for problem in problems))
    return list(made.values())


def untied(parameters: Sequence[Parameter], table: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The table of a base that ties its output matrix, for a model that does not: the head begins as the embedding."""
    sources = {parameter.role: parameter.sources[0] for parameter in parameters}
    embedding, head = table.get(sources["embedding"]), sources["lm_head"]
    missing = embedding is not None and head not in table
    return {**table, head: replace(embedding, name=head)} if embedding is not None and missing else dict(table)


def _as_one(
    parts: Parts, base: Mapping[str, TensorRef], needed: Collection[str], embedding: TensorRef, problems: list[str]
) -> tuple[Parts, set[str]]:
    """The parts for a base whose output matrix is its embedding, without those of the output matrix, which repeat.

    Also the modules with factors that are that one tensor.
    """
    ends = {module for module in _modules(parts) if f"{module}.weight" in HEADS}
    ends |= {module for module in _modules(parts) if embedding.name in _found(module, base, needed)}
    for module in sorted(ends & parts.copies.keys()):
        problems += _difference(parts.copies[module], embedding)
    saved = {module: parts.saved[module] for module in sorted(ends & parts.saved.keys())}
    values = list(saved.values()) if len(saved) > 1 else [*saved.values(), embedding]
    if any(ref.shape != embedding.shape for ref in values):
        problems += [_misshapen(ref, embedding) for ref in saved.values() if ref.shape != embedding.shape]
    elif not all(_same(values[0], other) for other in values[1:]):
        problems.append(
            f"the weights hold {' and '.join(saved)} with other values than the base's embedding, which is its output "
            f"matrix too (tie_word_embeddings), and {CONFIG} does not say that they are trained apart (modules_to_save "
            "without ensure_weight_tying): merge with PEFT and save the whole model"
        )
    kept = {module: ref for module, ref in parts.saved.items() if module not in saved}
    if len(saved) > 1:
        kept[embedding.name.removesuffix(".weight")] = values[0]
    copies = {module: ref for module, ref in parts.copies.items() if module not in ends}
    return replace(parts, saved=kept, copies=copies), ends & parts.factors.keys()


def _modules(parts: Parts) -> set[str]:
    return {*parts.factors, *parts.saved, *parts.copies}


def _difference(copy: TensorRef, target: TensorRef) -> list[str]:
    """What is wrong with the adapter's copy of a tensor of the base."""
    if copy.shape != target.shape:
        return [_misshapen(copy, target)]
    if _same(copy, target):
        return []
    return [
        f"{copy.file}: tensor {copy.name}: differs from the base's {target.name}, which it is a copy of: the adapter "
        "was trained on another base; name that one as `source`"
    ]


def _same(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors of one shape have the same values, or the one's are the other's, rounded to its dtype."""
    if one.dtype == other.dtype:
        return same_bytes(one, other)
    (left, right), (dtype, target) = (view(one), view(other)), (FLOATS[one.dtype][0], FLOATS[other.dtype][0])
    forth = back = True
    for rows in row_pieces(one.shape):
        mine, others = np.ascontiguousarray(left[rows]), np.ascontiguousarray(right[rows])
        forth = forth and np.array_equal(floats.cast(mine, dtype, target), others)
        back = back and np.array_equal(floats.cast(others, target, dtype), mine)
    return forth or back


def _misshapen(ref: TensorRef, target: TensorRef) -> str:
    resized = ref.shape[1:] == target.shape[1:]
    return (
        f"{ref.file}: tensor {ref.name}: shape {list(ref.shape)}, the base's {target.name} is {list(target.shape)}"
        + ("; the vocabulary was resized: merge with PEFT and save the whole model" if resized else "")
    )


def _found(module: str, base: Mapping[str, TensorRef], needed: Collection[str]) -> list[str]:
    """The base's tensors that the module's weight may be, by its whole name or the family's prefix more or less."""
    name = f"{module}.weight"
    if name in needed:
        return [name] if name in base else []
    return [n for n in needed if (n.endswith(f".{name}") or name.endswith(f".{n}")) and n in base]


def _target(
    module: str, base: Mapping[str, TensorRef], needed: Collection[str], problems: list[str]
) -> TensorRef | None:
    found = _found(module, base, needed)
    if len(found) == 1:
        return base[found[0]]
    name = f"{module}.weight"
    near = difflib.get_close_matches(name, sorted(needed)[:1000], n=1, cutoff=0.8)
    hint = f"; the model has {near[0]}" if near else ""
    problems.append(f"the adapter changes {name}, which is no tensor of the base that the model uses{hint}")
    return None


def _product(
    adapter: Adapter, module: str, parts: Mapping[str, TensorRef], target: TensorRef, problems: list[str]
) -> _Product | None:
    embedding = any(name.startswith("embedding_") for name in parts)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(parts) != set(names):
        missing = ", ".join(f"lora_{name}" for name in names if name not in parts)
        problems.append(f"the adapter has no {missing or 'single pair of factors'} of {module}")
        return None
    refs = [parts[name] for name in names]
    a, b = (_widened(ref) for ref in refs)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    if fits:
        # W [out, in] += B A; where W is stored the other way round, Wᵀ [in, out] += Aᵀ Bᵀ.
        # An output matrix never is (PEFT goes by the module's class, and it is `Linear` everywhere).
        turned = embedding or (bool(adapter.config.get("fan_in_fan_out")) and f"{module}.weight" not in HEADS)
        left, right = (a.T, b.T) if turned else (b, a)
        if (left.shape[0], right.shape[1]) == target.shape:
            if a.shape[0] == adapter.rank(module):
                return _Product(np.ascontiguousarray(left), np.ascontiguousarray(right), adapter.scale(module))
            problems.append(
                f"{refs[0].file}: tensor {refs[0].name} has rank {a.shape[0]}, but {CONFIG} says "
                f"{adapter.rank(module)} (r, or rank_pattern), and what is added is scaled by it"
            )
            return None
    shapes = ", ".join(f"{ref.name} {list(ref.shape)}" for ref in refs)
    problems.append(f"{refs[0].file}: {shapes} do not fit {target.name} {list(target.shape)} of the base")
    return None


def _widened(ref: TensorRef) -> npt.NDArray[np.float32]:
    return np.array(floats.widen(np.ascontiguousarray(view(ref)), FLOATS[ref.dtype][0]))


def _sums(target: TensorRef, products: Sequence[_Product]) -> Iterator[npt.NDArray[Any]]:
    weights, dtype = view(target), FLOATS[target.dtype][0]
    for rows in row_pieces(target.shape):
        sums = floats.widen(np.ascontiguousarray(weights[rows]), dtype)
        for product in products:
            left = product.left[rows]
            total = np.zeros((len(left), target.shape[1]), np.float32)
            for k in range(left.shape[1]):
                total += left[:, k, None] * product.right[k]
            sums = sums + total * np.float32(product.scale)
        yield floats.cast(sums, "float32", dtype)


def _copies(ref: TensorRef, dtype: str) -> Iterator[npt.NDArray[Any]]:
    values = view(ref)
    for rows in row_pieces(ref.shape):
        yield floats.cast(np.ascontiguousarray(values[rows]), FLOATS[ref.dtype][0], FLOATS[dtype][0])
