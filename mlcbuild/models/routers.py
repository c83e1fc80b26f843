"""Which experts a token goes to, where that is not by the largest of a softmax alone (Structure.scoring).

scores    softmax or sigmoid of the router's logits (`logits`: chosen by these, counted by their sigmoid);
          `router_correction` is added where experts are chosen, and does not count in their shares (Wang et al.,
          arXiv 2408.15664)
groups    experts of the few groups only whose `expert_group_best` best are best together: two of them (DeepSeek-V3,
          arXiv 2412.19437, 2.1.2) or one (DeepSeek-V2, arXiv 2405.04434, 2.2.2). With `expert_groups_zeroed` all others
          have the score 0: corrections may take one of them above those (A.X K2)
sparse_mixer  one after the other: a softmax over those that are not far below the best one left (Liu et al.,
          arXiv 2409.12136, as Phi-3.5-MoE computes it)

Written as tensor expressions, so they run on every device. Everything is float32, [n, experts] small.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from mlcbuild.models.decoder import Decoder
from mlcbuild.models.operations import Expr
from mlcbuild.models.weights import Given

BLOCK = "router_"  # what the names of its blocks begin with: on GPUs each row is one thread's
_NONE = -3.0e38  # below every score
# te.max begins with the least int32, which WGSL cannot write.
_LARGEST = te.comm_reducer(lambda a, b: tirx.max(a, b), lambda dtype: tirx.const(0, dtype), name="largest")
_TINY = 1e-20  # what transformers adds to the sum that shares are divided by


def choose(d: Decoder, logits: Expr, weight: Given) -> tuple[Expr, Expr]:
    """logits float32 [n, E] -> the experts chosen int32 [n, count], what each counts float32 [n, count]."""
    s, emit = d.structure, d.builder.emit
    if s.scoring == "sparse_mixer":
        rank = d.builder.emit_te(_ranks, logits, primfunc_name_hint="expert_ranks")
        return _pair(d, _mixed, rank, logits)
    scores = emit(relax.op.nn.softmax(logits, -1) if s.scoring == "softmax" else relax.op.sigmoid(logits))
    wanted = logits if s.scoring == "logits" else scores
    if "router_correction" in weight:
        wanted = emit(relax.op.add(wanted, d.cast(weight("router_correction").plain, "float32")))
    if s.expert_groups > 1:
        best = d.builder.emit_te(
            _best, wanted, s.expert_groups, s.expert_group_best, primfunc_name_hint="expert_groups"
        )
        ranks = d.builder.emit_te(_ranks, best, primfunc_name_hint="group_ranks")
        none = 0.0 if s.expert_groups_zeroed else _NONE
        wanted = d.builder.emit_te(
            _of_groups, wanted, ranks, s.expert_groups_per_tok, none, primfunc_name_hint="grouped"
        )
    rank = d.builder.emit_te(_ranks, wanted, primfunc_name_hint="expert_ranks")
    chosen, share = _pair(d, _picked, rank, scores)
    if s.norm_topk_prob:
        total = emit(relax.op.sum(share, axis=1, keepdims=True))
        share = emit(relax.op.divide(share, emit(relax.op.add(total, relax.const(_TINY, "float32")))))
    return chosen, d.scaled(share, s.routed_scaling_factor)


def narrow(d: Decoder, x: Expr, before: Expr, weight: Given) -> tuple[Expr, Expr]:
    """What a router's last matrix is given of x [n, H], where an MLP precedes it: [n, R]; what the next layer's router
    is given of it, as this one is `before`. Source: transformers modeling_zaya.py."""
    emit, compute = d.builder.emit, d.operations.compute
    made = d.biased(x, weight, "router_in", "router_in_bias", compute)
    if "router_carry" in weight:
        carried = emit(relax.op.multiply(before, d.cast(weight("router_carry").plain, compute)))
        made = emit(relax.op.add(made, carried))
    inner = d.norm(made, weight, "router_inner_norm")
    for role in ("router_1", "router_2"):
        inner = d.operations.activation(d.biased(inner, weight, role, f"{role}_bias", compute), "gelu")
    return inner, made


def zero_experts(d: Decoder, x: Expr, chosen: Expr, share: Expr) -> tuple[Expr, Expr, Expr]:
    """chosen and share [n, count] of all experts -> of those that compute; x [n, H] times the shares of the others.

    In place of a choice that computes nothing stands the last expert that does, with a share of 0.
    """
    experts, emit_te = d.structure.num_experts, d.builder.emit_te
    kept = emit_te(_kept, x, chosen, share, experts, primfunc_name_hint="zero_experts")
    share = emit_te(_computing, share, chosen, experts, primfunc_name_hint="zero_shares")
    return emit_te(_existing, chosen, experts, primfunc_name_hint="zero_choices"), share, kept


def _kept(x: te.Tensor, chosen: te.Tensor, share: te.Tensor, experts: int) -> te.Tensor:
    c, none = te.reduce_axis((0, share.shape[1]), "c"), tirx.const(0, "float32")
    total = te.compute(
        (share.shape[0],),
        lambda i: te.sum(tirx.Select(chosen[i, c] >= experts, share[i, c], none), axis=c),
        name=f"{BLOCK}kept",
    )
    return te.compute(x.shape, lambda i, j: (x[i, j].astype("float32") * total[i]).astype(x.dtype), name="kept")


def _computing(share: te.Tensor, chosen: te.Tensor, experts: int) -> te.Tensor:
    none = tirx.const(0, "float32")
    return te.compute(
        share.shape, lambda i, c: tirx.Select(chosen[i, c] < experts, share[i, c], none), name="computing"
    )


def _existing(chosen: te.Tensor, experts: int) -> te.Tensor:
    return te.compute(
        chosen.shape, lambda i, c: tirx.min(chosen[i, c], tirx.const(experts - 1, "int32")), name="choices"
    )


def _pair(d: Decoder, shares: Any, rank: Expr, values: Expr) -> tuple[Expr, Expr]:
    count = d.structure.num_experts_per_tok
    chosen = d.builder.emit_te(_chosen, rank, count, primfunc_name_hint="chosen_experts")
    more = (d.structure.router_jitter,) if shares is _mixed else ()
    return chosen, d.builder.emit_te(shares, rank, values, count, *more, primfunc_name_hint="expert_shares")


def _ranks(x: te.Tensor) -> te.Tensor:
    """[n, E] -> int32 [n, E]: how many are larger, or as large and before it. With NaN among them it is some number."""
    other = te.reduce_axis((0, x.shape[1]), "other")

    def before(i: Any, e: Any) -> Any:
        a, b = x[i, other], x[i, e]
        return te.sum(tirx.any(a > b, tirx.all(a == b, other < e)).astype("int32"), axis=other)

    return te.compute((x.shape[0], x.shape[1]), before, name=f"{BLOCK}ranks")


def _chosen(rank: te.Tensor, count: int) -> te.Tensor:
    """The expert of each rank; of ranks that are in disorder (NaN), one that exists."""
    e = te.reduce_axis((0, rank.shape[1]), "e")

    def number(i: Any, c: Any) -> Any:
        of_rank = tirx.Select(rank[i, e] == c.astype("int32"), e.astype("int32"), tirx.const(0, "int32"))
        return _LARGEST(of_rank, axis=e)

    return te.compute((rank.shape[0], count), number, name=f"{BLOCK}chosen")


def _picked(rank: te.Tensor, scores: te.Tensor, count: int) -> te.Tensor:
    e = te.reduce_axis((0, rank.shape[1]), "e")

    def score(i: Any, c: Any) -> Any:
        return te.sum(tirx.Select(rank[i, e] == c.astype("int32"), scores[i, e], tirx.const(0, "float32")), axis=e)

    return te.compute((rank.shape[0], count), score, name=f"{BLOCK}shares")


def _best(x: te.Tensor, groups: int, count: int) -> te.Tensor:
    """[n, E] -> [n, groups]: the largest sum of `count` experts of each group, 1 or 2."""
    size = int(x.shape[1]) // groups
    a, b = te.reduce_axis((0, size), "a"), te.reduce_axis((0, size), "b")

    if count == 1:
        return te.compute((x.shape[0], groups), lambda i, g: te.max(x[i, g * size + a], axis=a), name=f"{BLOCK}groups")

    def best(i: Any, g: Any) -> Any:
        both = x[i, g * size + a] + x[i, g * size + b]
        return te.max(tirx.Select(a < b, both, tirx.const(_NONE, "float32")), axis=[a, b])

    return te.compute((x.shape[0], groups), best, name=f"{BLOCK}groups")


def _of_groups(x: te.Tensor, rank: te.Tensor, count: int, other: float) -> te.Tensor:
    """Scores of those in the `count` best groups, `other` for the rest."""
    size = int(x.shape[1]) // int(rank.shape[1])
    none = tirx.const(other, "float32")
    return te.compute(
        (x.shape[0], x.shape[1]), lambda i, e: tirx.Select(rank[i, e // size] < count, x[i, e], none), name="grouped"
    )


def _mixed(rank: te.Tensor, logits: te.Tensor, count: int, jitter: float) -> te.Tensor:
    """Each choice's probability among what is left: itself and those below it by no more than 2 * jitter."""
    best = _picked(rank, logits, count)
    e = te.reduce_axis((0, rank.shape[1]), "e")

    def weight(i: Any, c: Any) -> Any:
        top, x = best[i, c], logits[i, e]
        far = (top - x) / tirx.max(tirx.abs(x), top) > tirx.const(2 * jitter, "float32")
        left_out = tirx.any(rank[i, e] < c.astype("int32"), far)
        return te.sum(tirx.Select(left_out, tirx.const(0, "float32"), tirx.exp(x - top)), axis=e)

    total = te.compute((rank.shape[0], count), weight, name=f"{BLOCK}total")
    return te.compute(
        (rank.shape[0], count), lambda i, c: tirx.const(1, "float32") / total[i, c], name=f"{BLOCK}shares"
    )
