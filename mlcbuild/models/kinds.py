"""Kinds of model other than the decoder: what of a structure they fix, the shapes of their parameters.

A structure's `kind` is `decoder`, `rwkv4`, `rwkv5`, `rwkv6`, `mamba`, `mamba2` (mlcbuild.models.recurrent) or
`encoder` (mlcbuild.models.encoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcbuild.models.structure import Structure

DECODER, ENCODER = "decoder", "encoder"
STATE_SPACES = ("mamba", "mamba2")
RECURRENT = ("rwkv4", "rwkv5", "rwkv6", *STATE_SPACES)
KINDS = (DECODER, *RECURRENT, ENCODER)

Shapes = dict[str, tuple[int, ...]]  # by role; matrices are [N out, K in]


def by_layer(structure: Structure) -> bool:
    """Whether the model can be run one layer at a time (mlcbuild.models.layer_pieces)."""
    return structure.kind == DECODER


def recurrent_shapes(s: Structure) -> Shapes:
    """The roles of mlcbuild.models.recurrent.layers. Vectors have the checkpoints' shapes, MLC's too: [1, 1, H]."""
    if s.kind in STATE_SPACES:
        return _state_space_shapes(s)
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


def _state_space_shapes(s: Structure) -> Shapes:
    """The roles of mlcbuild.models.recurrent.state_space: I channels, in heads; B and C for each group of heads."""
    h, heads, width = s.hidden_size, s.num_attention_heads, s.num_attention_heads * s.head_dim
    both = 2 * s.num_key_value_heads * s.state_size
    # Mamba finds steps, B and C in the channels after their convolution, Mamba-2 beside them.
    one = s.kind == "mamba"
    into, convolved = (2 * width, width) if one else (2 * width + both + heads, width + both)
    return {
        "embedding": (s.vocab_size, h),
        "lm_head": (s.vocab_size, h),
        "mixer_norm": (h,),
        "final_norm": (h,),
        "in_proj": (into, h),
        "in_bias": (into,),
        "convolution": (convolved, 1, s.conv_kernel),
        "convolution_bias": (convolved,),
        "step_in_proj": (s.time_step_rank + both, width),
        "step_proj": (heads, s.time_step_rank),
        "step_bias": (heads,),
        "state_rate": (s.state_size, heads) if one else (heads,),
        "state_skip": (heads,),
        "state_norm": (width,),
        "out_proj": (h, width),
        "out_bias": (h,),
    }


def filled(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those fields that a decoder has a choice about and this kind has not."""
    if kind == DECODER:
        return dict(values)
    fixed: dict[str, Any] = {"norm": "layer", "mlp": "plain", "rope": "none", "tie_word_embeddings": False}
    if kind in RECURRENT:
        fixed |= {"activation": "relu2"}
    return {"num_key_value_heads": values.get("num_attention_heads"), **fixed, **values, "kind": kind}
