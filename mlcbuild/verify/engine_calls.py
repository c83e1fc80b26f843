"""What an engine calls around a model: logits changed, softmax, sampling, rows copied; compared with NumPy.

Arguments and results are those of docs/contract.md. Numbers are chosen such that rounding changes no choice: a sample
lies in the middle of its token's share, and so does a bound of the shares that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import tvm_runtime
from mlcbuild.runtime.device import Device
from mlcbuild.runtime.library import Library

Array = npt.NDArray[Any]
_TEXTS = 2  # at once: what the libraries that are tried are made for
_VOCABULARY = 4500  # tokens: more than a sorted tile (gpu/sorting.py), and than a chunk of softmax
_CHOSEN = (0, 5, 40)  # places, in the order of probability, of what is sampled: all within the kept
_KEPT = 60  # tokens that top_p keeps
_MASKED = 1e30  # a logit of this size stands for minus infinity
_ROUNDING = 1e-5  # of sums of a few thousand float32 numbers, relative to the largest


@dataclass(frozen=True)
class Call:
    """What a function is given, and what it ought to give: results, or what `changed` of its arguments become.

    `hidden`: arguments of float32 are given in the model dtype, which holds their numbers exactly.
    """

    name: str
    given: tuple[Array, ...]
    expected: tuple[Array, ...]
    changed: tuple[int, ...] = ()
    hidden: bool = False


def run(library: Library, model_dtype: str) -> list[str]:
    """Call what the library has of these functions; their names. Raises MlcBuildError with all that are wrong."""
    called = [call for call in calls() if library.has(call.name)]
    problems = [problem(library, call, model_dtype) for call in called]
    if any(problems):
        wrong = [each for each in problems if each]
        raise MlcBuildError("\n".join(["functions of the library do not compute what the contract says:", *wrong]))
    return sorted({call.name for call in called})


def problem(library: Library, call: Call, model_dtype: str) -> str | None:
    """What is wrong with what the library makes of a call; None where it is right."""
    device, dtype = library.device, model_dtype if call.hidden else "float32"
    given = [placed(device, array.copy(), dtype) for array in call.given]  # a CPU's function changes the array itself
    made = library[call.name](*given)
    results = [given[i] for i in call.changed] or ([made] if len(call.expected) == 1 else list(made))
    for number, (result, expected) in enumerate(zip(results, call.expected, strict=True)):
        got = device.array(result, expected.shape)
        if expected.dtype != np.float32:
            wrong = int((got != expected).sum())
            if wrong:
                return f"{call.name}: {wrong} of {expected.size} values of result {number} are wrong"
            continue
        off, size = np.abs(got - expected), np.abs(expected)
        # A masked logit is no measure of the others.
        allowed = _ROUNDING * np.maximum(size, size[size < _MASKED].max(initial=0))
        if not (off <= allowed).all():
            return f"{call.name}: result {number} is off by {off.max():.2g}"
    return None


def placed(device: Device, array: Array, dtype: str) -> Any:
    """A tensor of the device: of float32 numbers in `dtype`, cut to its precision, of others as they are."""
    if array.dtype != np.float32 or dtype == "float32":
        return device.tensor(array)
    if dtype == "float16":
        return device.tensor(array.astype(np.float16))
    bits = (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16)
    return tvm_runtime.view(device.tensor(bits), array.shape, dtype)


def calls() -> Iterator[Call]:
    """Every function once."""
    random = np.random.default_rng(0)
    yield from _of_rows(random)
    yield from _of_logits(random)
    logits = 2 * random.standard_normal((_TEXTS, _VOCABULARY)).astype(np.float32)
    temperature = np.array([0.5, 2.0], np.float32)
    probs = _softmax(logits / temperature[:, None])
    yield Call("softmax_with_temperature", (logits[:, None], temperature), (probs[:, None],))
    yield from _samples(probs)
    yield _drafts(random)


def _of_rows(random: np.random.Generator) -> Iterator[Call]:
    few, many = (random.integers(-99, 99, (rows, 48)).astype(np.float32) for rows in (2, 5))
    places = np.array([3, 1], np.int32)
    scattered = many.copy()
    scattered[places] = few
    for kind in ("probs", "hidden_states"):
        hidden = kind == "hidden_states"
        yield Call(f"gather_{kind}", (many, places, np.zeros_like(few)), (many[places],), (2,), hidden)
        yield Call(f"scatter_{kind}", (few, places, many), (scattered,), (2,), hidden)


def _of_logits(random: np.random.Generator) -> Iterator[Call]:
    logits = random.standard_normal((3, 70)).astype(np.float32)
    rows, of, tokens = (np.array(each, np.int32) for each in ([2, 0], [0, 0, 1], [69, 3, 5]))
    bias, counts = np.array([1.5, -2, 3], np.float32), np.array([1, 4, 2], np.int32)
    expected = logits.copy()
    expected[of, tokens] += bias
    yield Call("apply_logit_bias_inplace", (logits, of, tokens, bias), (expected,), (0,))
    penalties = np.array([[0.5, 0.25, 2], [1, 0.125, 1.5]], np.float32)
    presence, frequency, repetition = penalties[of].T
    expected = logits.copy()
    less = expected[rows[of], tokens] - presence - counts * frequency
    expected[rows[of], tokens] = np.where(less < 0, less * repetition, less / repetition)
    yield Call("apply_penalty_inplace", (logits, rows, of, tokens, counts, penalties), (expected,), (0,))
    allowed = random.integers(0, 2, (3, 96)).astype(bool)
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    expected = np.where(allowed[:, :70], logits, np.finfo(np.float32).min)
    expected[1] = logits[1]
    yield Call("apply_bitmask_inplace", (logits, rows, words), (expected,), (0,))


def _samples(probs: Array) -> Iterator[Call]:
    """Of the likeliest tokens and of all; probabilities looked up, and shared out anew among those that are kept."""
    order = np.argsort(-probs, axis=1, kind="stable").astype(np.int32)
    ordered = np.take_along_axis(probs, order, 1)
    sums = ordered.astype(np.float64).cumsum(1)
    top_p = _middle(sums, [_KEPT - 1] * len(sums))
    yield Call("argsort_probs", (probs,), (ordered, order))
    rows, places = np.array([0, 1, 1], np.int32), np.array(_CHOSEN)
    uniform = _middle(sums[rows] / sums[rows, _KEPT - 1][:, None], places)
    tokens = order[rows, places]
    yield Call("sample_with_top_p", (ordered, order, uniform, rows, top_p), (tokens,))
    in_turn = probs.astype(np.float64).cumsum(1)
    uniform = _middle(in_turn[rows] / in_turn[rows, -1][:, None], tokens)
    yield Call("multinomial_from_uniform", (probs, uniform, rows), (tokens,))
    kept = np.where(probs >= ordered[:, [_KEPT - 1]], probs, 0)
    renewed = (kept / kept.sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    yield Call("renormalize_by_top_p", (probs, top_p, np.zeros((len(probs), 3), np.float32)), (renewed,))
    flat = np.array([_VOCABULARY + 1, 2], np.int32)  # the second of row 1, the third of row 0
    top = order.reshape(-1)[flat]
    looked_up = probs[rows, tokens], probs[flat // _VOCABULARY, top], top
    yield Call("sampler_take_probs", (probs, order, rows, tokens, flat), looked_up)


def _drafts(random: np.random.Generator) -> Call:
    """A root with two drafted tokens: the first is refused; the second, compared with what is left, and its one child
    are accepted."""
    draft, model = (_softmax(random.standard_normal((4, 1500))).astype(np.float32) for _ in range(2))
    left = np.maximum(model[0] - draft[1], 0)
    left /= left.sum(dtype=np.float64)
    refused = int(np.argmax(draft[1] / model[0]))
    tokens = np.array([0, refused, int(np.argmax(left / draft[2])), int(np.argmax(model[2] / draft[3]))], np.int32)
    child, sibling = np.array([1, -1, 3, -1], np.int32), np.array([-1, 2, -1, -1], np.int32)
    uniform, root = np.array([0, 0.9, 0.9, 0.9], np.float32), np.array([0], np.int32)
    after = model.copy()
    after[0] = left
    given = (draft, tokens, model, child, sibling, uniform, root)
    return Call("sampler_verify_draft_tokens", given, (after, np.array([3], np.int32)), (2, 6))


def _middle(sums: Array, places: Any) -> Array:
    """[rows]: half of the way from the running sum before a row's place to that with it."""
    rows, places = np.arange(len(sums)), np.asarray(places)
    before = np.where(places > 0, sums[rows, places - 1], 0)
    middle: Array = ((before + sums[rows, places]) / 2).astype(np.float32)
    return middle


def _softmax(logits: Array) -> Array:
    e = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    result: Array = (e / e.sum(1, keepdims=True)).astype(np.float32)
    return result
