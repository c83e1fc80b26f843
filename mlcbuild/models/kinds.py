"""Kinds of model other than the decoder: what of a structure they fix, the shapes of their parameters.

A structure's `kind` is `decoder`, `hybrid` (mlcbuild.models.hybrid), `rwkv4`, `rwkv5`, `rwkv6`, `mamba`, `mamba2`,
`mlstm` (mlcbuild.models.recurrent) or `encoder` (mlcbuild.models.encoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcbuild.models import mixers
from mlcbuild.models.structure import Structure

DECODER, HYBRID, ENCODER = "decoder", "hybrid", "encoder"
STATE_SPACES, MLSTM = ("mamba", "mamba2"), "mlstm"
RECURRENT = ("rwkv4", "rwkv5", "rwkv6", *STATE_SPACES, MLSTM)
TEXT_WINDOW = 1024  # tokens of a sequence, where a text is evaluated
KINDS = (DECODER, HYBRID, *RECURRENT, ENCODER)

Shapes = dict[str, tuple[int, ...]]  # by role; matrices are [N out, K in]


def by_layer(structure: Structure) -> bool:
    """Whether the model can be run one layer at a time (mlcbuild.models.layer_pieces, encoder_pieces)."""
    s = structure
    if s.kind == ENCODER:
        return "relative_bias" not in s.roles()  # which all layers share
    if s.indexer and s.indexer[5] and s.indexer[0] < TEXT_WINDOW:  # layers share what an indexer chooses in texts
        return False
    whole = s.keys_from is not None or s.joins is not None or s.per_layer_size or s.shortcut or s.key_experts
    return s.kind == DECODER and not whole


def recurrent_shapes(s: Structure) -> Shapes:
    """The roles of mlcbuild.models.recurrent.layers. Vectors have the checkpoints' shapes, MLC's too: [1, 1, H]."""
    if s.kind in (*STATE_SPACES, MLSTM):
        return _mixer_shapes(s)
    h, width, inner = s.hidden_size, s.num_attention_heads * s.head_dim, s.intermediate_size
    norms = [f"{name}_norm{part}" for name in ("first", "attention", "mlp", "final") for part in ("", "_bias")]
    shapes: Shapes = {
        "embedding": (s.vocab_size, h),
        "lm_head": (s.vocab_size, h),
        **dict.fromkeys(norms, (h,)),
        **{f"time_{name}_proj": (width, h) for name in ("key", "value", "receptance", "gate")},
        "time_output_proj": (h, width),
        "channel_key_proj": (inner, h),
        "channel_receptance_proj": (h, h),
        "channel_value_proj": (h, inner),
        **{f"time_mix_{name}": (1, 1, h) for name in ("key", "value", "receptance", "gate")},
        **{f"time_maa_{name}": (1, 1, h) for name in ("x", "w", "k", "v", "r", "g")},
        **{f"channel_mix_{name}": (1, 1, h) for name in ("key", "receptance")},
        **{f"channel_maa_{name}": (1, 1, h) for name in ("k", "r")},
        "time_norm": (width,),
        "time_norm_bias": (width,),
        "time_faaaa": (s.num_attention_heads, s.head_dim),
        "time_maa_w1": (h, 5 * s.time_mix_extra_dim),
        "time_maa_w2": (5, s.time_mix_extra_dim, h),
        "time_decay_w1": (h, s.time_decay_extra_dim),
        "time_decay_w2": (s.time_decay_extra_dim, width),
        "time_first": (width,),
    }
    decays = {"rwkv4": (width,), "rwkv5": (s.num_attention_heads, s.head_dim), "rwkv6": (1, 1, width)}
    return {**shapes, "time_decay": decays[s.kind]}


def _mixer_shapes(s: Structure) -> Shapes:
    """The roles of mlcbuild.models.recurrent.state_space and mlstm."""
    h, inner = s.hidden_size, s.intermediate_size
    outside = {"embedding": (s.vocab_size, h), "lm_head": (s.vocab_size, h), "mixer_norm": (h,), "final_norm": (h,)}
    dense = {"mlp_norm": (h,), "gate_up_proj": (2 * inner, h), "down_proj": (h, inner)}
    return {**outside, **(dense if s.kind == MLSTM else {}), **mixers.shapes(s)}


def filled(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those fields that a decoder has a choice about and this kind has not."""
    if kind == DECODER:
        return dict(values)
    if kind == HYBRID:
        return {**values, "kind": kind}
    fixed: dict[str, Any] = {"norm": "layer", "mlp": "plain", "rope": "none", "tie_word_embeddings": False}
    if kind in RECURRENT:
        fixed |= {"activation": "relu2"}
    if kind == ENCODER:
        fixed |= {"norm_position": "sum"}
    return {"num_key_value_heads": values.get("num_attention_heads"), **fixed, **values, "kind": kind}
