"""An indexer beside latent attention, which chooses the keys that a token attends to (DeepSeek-V3.2-Exp; transformers
modeling_deepseek_v32.py).

    score of a key for a token = sum over index heads h of index_weights(x)[h] * relu(query_h · key)
    query_h = a head of index_query(latent of queries),  key = layer norm of index_key(x), both turned

The best `keys` of all that a token sees are chosen, of equal ones the first; where there are no more, all. Factors that
are the same for all heads, and so for all keys, are left out.

Structure.indexer has seven numbers: `keys`; index heads; their `width`; whether neighbours are turned together (1) or
halves (0); the first dimension that is turned; whether layers without an indexer have the choice of the last layer with
one (1), or see all keys (0); and the epsilon of the norm.

A layer calls the KV cache twice, with the same keys and values; it stores them twice at one place. A call of scale 0
chooses: queries are the index heads' and their weights, what comes back is a list of positions. The other one attends:
queries have that list with them. So kernels need nothing but what the cache gives them, whichever sets of keys there
are. The heads of such a cache are, for a token (Structure.cache_heads):

    queries   the model's, and more heads that hold index queries and weights, or the list: three numbers to a position
              p, the digits of p + 1 to the base of 256, which all dtypes have; 0 ends it. A list that begins with the
              end means all keys. Behind the list, five numbers to a position are for kernels, which keep scores there
    keys      of latents, the last `width` numbers of a row are the index key; else it is in the key, and then the
              value, of one head more
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, te, tirx

from mlcbuild.errors import MlcBuildError
from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.rope import inverse_frequencies, rotary
from mlcbuild.models.structure import Structure
from mlcbuild.models.weights import Given

DIGITS = 3  # of a position in a list
MOST_KEYS, WIDEST = 4096, 512  # that kernels choose, and numbers of an index head: likewise in cpu/kernels/choice.c


@dataclass(frozen=True)
class Indexer:
    """Structure.indexer, by name. `queries`: the model's heads of queries in the cache, before those of the indexer,
    and `key_heads` of keys; an index key begins at number `at` of the key and value of head `key_head`."""

    keys: int
    heads: int
    width: int
    neighbours: bool
    start: int
    shared: bool
    eps: float
    queries: int
    key_heads: int
    key_head: int
    at: int


def indexer_of(s: Structure) -> Indexer:
    keys, heads, width, neighbours, start, shared, eps = s.indexer
    queries, key_heads, _ = replace(s, indexer=()).cache_heads
    key_head, at = (0, 2 * s.cache_heads[2] - width) if s.absorbed else (key_heads, 0)
    turned = bool(neighbours), start, bool(shared), eps
    return Indexer(keys, heads, width, *turned, queries, key_heads, key_head, at)


def check(s: Structure) -> None:
    """Raises MlcBuildError for an indexer that no kernel takes."""
    keys, _, width, *_ = s.indexer or (0, 0, 0)
    if keys > MOST_KEYS or width > WIDEST:
        raise MlcBuildError(
            f"its indexer chooses {keys} keys by heads of {width}: kernels choose up to {MOST_KEYS}, by heads of up to "
            f"{WIDEST}; with a context_window_size of at most {keys} it is not needed"
        )


def shared(s: Structure) -> bool:
    """Whether layers give their choice to others: in shorter texts, all keys are chosen."""
    return bool(s.indexer) and bool(s.indexer[5]) and s.context_window_size > s.indexer[0]


def borrows(d: Decoder, number: int) -> bool:
    """Whether a layer attends to what another one's indexer chose."""
    return shared(d.structure) and not has(d, number)


def variables(d: Decoder, number: int, n: Expr) -> list[relax.Var]:
    """What a layer that borrows is given besides: the choice of another [n, 3 * keys]."""
    return [d.tensor("chosen", [n, DIGITS * d.structure.indexer[0]])] if borrows(d, number) else []


def has(d: Decoder, number: int) -> bool:
    """Whether a layer has an indexer."""
    return any(p.role == "index_query" and p.of(number) for p in d.declared)


def attended(
    d: Decoder,
    qkv: Expr,
    x: Expr,
    latent: Expr,
    own: Structure,
    weight: Given,
    positions: Callable[[], Expr],
    chosen: Expr | None,
    through: Callable[[Expr, float], Expr],
    scale: float,
) -> tuple[Expr, Expr | None]:
    """What attention of `scale` returns for qkv, the heads that a cache without an indexer has, and the choice.

    x [n, H] is what the layer is given, `latent` [n, q_lora_rank] what queries are made of. `chosen` [n, 3 * keys]:
    another layer's choice. `through(qkv, scale)` calls the cache: the cache's heads -> [n, heads of queries, width].
    """
    if "index_query" not in weight:
        return through(_whole(d, qkv, None, [chosen] if chosen is not None else []), scale), None
    queries, key, weights = _made(d, x, latent, own, weight, positions())
    chosen = _list(d, through(_whole(d, qkv, key, [queries, weights]), 0.0))
    return through(_whole(d, qkv, key, [chosen]), scale), chosen


def _made(d: Decoder, x: Expr, latent: Expr, own: Structure, weight: Given, positions: Expr) -> tuple[Expr, Expr, Expr]:
    """Index queries [n, heads * width], key [n, width] and weights [n, heads], in the model dtype."""
    it, n = indexer_of(d.structure), x.ty.shape[0]
    compute = d.operations.compute
    queries = d.operations.linear(latent, weight("index_query"), d.dtype)
    key = d.operations.linear(x, weight("index_key"), compute)
    norm, bias = (weight(role).plain for role in ("index_norm", "index_norm_bias"))
    key = d.cast(d.operations.layer_norm(key, norm, bias, it.eps), d.dtype)

    def turned_first(queries: te.Tensor, key: te.Tensor) -> te.Tensor:
        """Both with what is turned in front, which changes no product of them."""

        def number(i: Any, h: Any, j: Any) -> Any:
            at = (j + it.start) % it.width
            return tirx.if_then_else(h < it.heads, queries[i, tirx.min(h, it.heads - 1) * it.width + at], key[i, at])

        return te.compute((n, it.heads + 1, it.width), number, name="index_heads")

    heads = d.builder.emit_te(turned_first, queries, key, primfunc_name_hint="index_heads")
    turning = replace(rotary(own), neighbours=it.neighbours)
    heads = d.operations.rope(heads, positions, inverse_frequencies(own), (it.heads + 1, 0), turning)
    flat = d.builder.emit(relax.op.reshape(heads, [n, (it.heads + 1) * it.width]))
    parts = d.builder.emit(relax.op.split(flat, [it.heads * it.width], axis=1))
    queries, key = (d.builder.emit(relax.TupleGetItem(parts, i)) for i in range(2))
    return queries, key, d.operations.linear(x, weight("index_weights"), d.dtype)


def _whole(d: Decoder, qkv: Expr, key: Expr | None, more: list[Expr]) -> Expr:
    """The cache's heads: those of qkv, with an index key, zeros where there is none, and `more` behind the queries."""
    s, it = d.structure, indexer_of(d.structure)
    queries, key_heads, dim = s.cache_heads
    zero = tirx.const(0, d.dtype)

    def heads(qkv: te.Tensor, *given: te.Tensor) -> te.Tensor:
        rest = given if key is None else given[1:]

        def behind(i: Any, p: Any) -> Any:
            found, start = zero, 0
            for each in rest:
                width = int(each.shape[1])
                inside = tirx.all(p >= start, p < start + width)
                found = tirx.if_then_else(inside, each[i, tirx.max(tirx.min(p - start, width - 1), 0)], found)
                start += width
            return found

        def number(i: Any, h: Any, j: Any) -> Any:
            side, head = (h - queries) // key_heads, (h - queries) % key_heads
            at = side * dim + j - it.at
            indexed = zero
            if key is not None:
                indexed = tirx.if_then_else(
                    tirx.all(at >= 0, at < it.width), given[0][i, tirx.max(tirx.min(at, it.width - 1), 0)], zero
                )
            last = it.queries + 2 * it.key_heads - 1
            of_key = qkv[i, tirx.min(it.queries + side * it.key_heads + head, last), j]
            index = tirx.all(head == it.key_head, at >= 0)
            of_key = tirx.if_then_else(index, indexed, of_key)
            of_query = tirx.if_then_else(
                h < it.queries, qkv[i, tirx.min(h, it.queries - 1), j], behind(i, (h - it.queries) * dim + j)
            )
            return tirx.if_then_else(h < queries, of_query, of_key)

        return te.compute((qkv.shape[0], queries + 2 * key_heads, dim), number, name="indexed_heads")

    given = [qkv, *([] if key is None else [key]), *more]
    return d.builder.emit_te(heads, *given, primfunc_name_hint="indexed_heads", primfunc_attrs={"op_pattern": 8})


def _list(d: Decoder, out: Expr) -> Expr:
    """The list of positions that a call of scale 0 returned in [n, heads, width]: [n, 3 * keys]."""
    it, dim = indexer_of(d.structure), d.structure.cache_heads[2]

    def chosen(out: te.Tensor) -> te.Tensor:
        shape = out.shape[0], DIGITS * it.keys
        return te.compute(shape, lambda i, p: out[i, it.queries + p // dim, p % dim], name="chosen")

    return d.builder.emit_te(chosen, out, primfunc_name_hint="chosen", primfunc_attrs={"op_pattern": 8})
