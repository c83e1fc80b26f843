"""Mixers with a state of one size: what stands in a layer in place of attention, or beside it (Structure.mixer).

conv      a short convolution between two gates (LFM2; Liquid AI, arXiv 2511.23404)
mamba     Gu and Dao, arXiv 2312.00752
mamba2    Dao and Gu, arXiv 2405.21060
delta     the gated delta net (Yang et al., arXiv 2412.06464): state_groups heads of keys of state_size dimensions,
          state_heads of values of state_head_dim
kda       the same with a decay for each key dimension (Kimi Team, arXiv 2510.26692)
rglru     a gated linear recurrence (De et al., arXiv 2402.19427)
mlstm     a matrix memory with exponential gates (Beck et al., arXiv 2405.04517): keys of `size` numbers
lightning a linear attention that fades by the same share at every token (Qin et al., arXiv 2401.04658)

A structure's fields for them, and for what hybrids have around them:

    state_heads       of state_head_dim channels, of which state_groups share their inputs
    mixer_scale       hybrid: what a mixer is given is multiplied with, mixer_scales each part of its inputs (mamba2:
                      gates, channels, B, C, steps), mixer_out_scale what it returns; attention_in_scale,
                      attention_out_scale, gate_scale (gates of an MLP with matrices apart), mlp_out_scale likewise
    convolutions      hybrid: tokens that each of two convolutions of queries and keys sees, which layers with attention
                      have a state for, then (mlcbuild.models.hybrid.convolved)
    decay_limit       kda: the least logarithm of a decay; None: there is none
    residual_normed   hybrid: what attention and MLP are given is added to, and not x; kept_scale: of what is added to
    attention_into_mixer  mamba2: attention of layers of type `both` is given x beside the embeddings, an MLP what it
                      returns, and the mixer is given x + into_mixer(that): nothing of it is added to x (Zamba, arXiv
                      2405.16712, 2411.15242). adapter_rank: of the differences of matrices that layers share
    gate_softcapping  mlstm, c: gates of writing and keeping become c * tanh(gate / c). state_size is of a key there
    beta_scale        delta: of the gates of writing; state_gate: the activation of the gate of what heads return;
                      state_norm_first: of mamba2, whether the norm precedes the gate
    state_size        mamba, mamba2: values that a channel keeps. conv_kernel: tokens that a convolution sees;
                      time_step_rank: width of a low-rank product; time_step_limits: between which steps are kept;
                      state_norm_eps: of norms over steps, B and C, None: none. mamba2 has num_key_value_heads groups

What they compute is in mlcbuild.models.hybrid and mlcbuild.models.recurrent.state_space; here are their sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlcbuild.models.structure import Structure

Shapes = dict[str, tuple[int, ...]]  # by role; matrices are [N out, K in]


@dataclass(frozen=True)
class Mixer:
    """`heads` of `dim` channels, each with a state of `size` values, in `groups`; `taps` tokens of a convolution."""

    name: str
    hidden: int
    heads: int
    dim: int
    groups: int
    size: int
    taps: int
    rank: int

    @property
    def width(self) -> int:
        """Of the channels of all heads."""
        return self.heads * self.dim

    @property
    def inner(self) -> int:
        """Of what goes into the states of all groups, and of what reads them."""
        return self.groups * self.size

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return {"mamba": self.width, "rglru": self.width, "conv": self.hidden}.get(
            self.name, self.width + 2 * self.inner
        )


def mixer_of(s: Structure) -> Mixer:
    """That of a hybrid, or of a model that has nothing else and counts its heads as attention's."""
    sizes = s.state_size, s.conv_kernel, s.time_step_rank
    if s.mixer:
        return Mixer(s.mixer, s.hidden_size, s.state_heads, s.state_head_dim, s.state_groups, *sizes)
    return Mixer(s.kind, s.hidden_size, s.num_attention_heads, s.head_dim, s.num_key_value_heads, *sizes)


def shapes(s: Structure) -> Shapes:
    """Of every parameter that the mixer may have, in one layer."""
    m = mixer_of(s)
    return {
        "convolution": (m.convolved, 1, m.taps),
        "convolution_bias": (m.convolved,),
        "out_bias": (m.hidden,),
        **_SHAPES[m.name](m),
        **({"state_rate": (m.heads,)} if m.name == "kda" and "in_step_proj" in s.roles() else {}),
    }


def _conv(m: Mixer) -> Shapes:
    return {"in_proj": (3 * m.hidden, m.hidden), "in_bias": (3 * m.hidden,), "out_proj": (m.hidden, m.hidden)}


def _state_space(m: Mixer) -> Shapes:
    # Mamba finds steps, B and C in the channels after their convolution, of each group alone; Mamba-2 beside them.
    one = m.name == "mamba"
    into = 2 * m.width if one else m.width + m.convolved + m.heads
    steps, apart = m.rank + 2 * m.size, m.width // m.groups
    return {
        "in_proj": (into, m.hidden),
        "in_bias": (into,),
        "step_in_proj": (steps, m.width) if m.groups == 1 else (m.groups, steps, apart),
        "step_proj": (m.heads, m.rank) if m.groups == 1 else (m.groups, apart, m.rank),
        "step_bias": (m.heads,),
        "state_rate": (m.size, m.heads) if one else (m.heads,),
        "state_skip": (m.heads,),
        "state_norm": (m.width,),
        "step_norm": (m.rank,),
        "state_in_norm": (m.inner,),
        "state_out_norm": (m.inner,),
        "out_proj": (m.hidden, m.width),
    }


def _delta(m: Mixer) -> Shapes:
    # One matrix for all; one for most, and one for what gates writing and keeping; or one for each.
    return {
        "in_proj": (m.convolved, m.hidden),
        "joined_in_proj": (m.convolved + m.width + 2 * m.heads, m.hidden),
        "grouped_in_proj": (m.convolved + m.width, m.hidden),
        "in_gate_proj": (m.width, m.hidden),
        "in_step_proj": (m.heads, m.hidden),
        "in_beta_proj": (m.heads, m.hidden),
        "grouped_step_proj": (2 * m.heads, m.hidden),
        "step_bias": (m.heads,),
        "state_rate": (m.heads,),
        "state_norm": (m.dim,),
        "out_proj": (m.hidden, m.width),
    }


def _kda(m: Mixer) -> Shapes:
    return {
        "in_proj": (m.convolved, m.hidden),
        "in_gate_proj": (m.width, m.hidden),
        "in_step_proj": (m.heads * m.size, m.hidden),
        "gate_a_proj": (m.dim, m.hidden),
        "gate_b_proj": (m.width, m.dim),
        "step_a_proj": (m.dim, m.hidden),
        "step_b_proj": (m.heads * m.size, m.dim),
        "step_bias": (m.heads * m.size,),
        "in_beta_proj": (m.heads, m.hidden),
        "state_rate": (1, 1, m.heads, 1),
        "state_norm": (m.dim,),
        "out_proj": (m.hidden, m.width),
    }


def _rglru(m: Mixer) -> Shapes:
    names = ("in", "in_gate")
    gates = {f"{name}_gate": (m.heads, m.dim, m.dim) for name in ("read", "keep")}
    return {
        **{f"{name}_proj": (m.width, m.hidden) for name in names},
        **{f"{name}_bias": (m.width,) for name in names},
        **gates,
        **{f"{name}_gate_bias": (m.heads, m.dim) for name in ("read", "keep")},
        "state_rate": (m.width,),
        "out_proj": (m.hidden, m.width),
    }


def _lightning(m: Mixer) -> Shapes:
    return {
        "in_proj": (2 * m.inner + m.width, m.hidden),
        "in_gate_proj": (m.width, m.hidden),
        "state_rate": (m.heads, 1, 1),
        "state_norm": (m.width,),
        "out_proj": (m.hidden, m.width),
    }


def _mlstm(m: Mixer) -> Shapes:
    # Queries, keys, values and what gates the output; gates of writing and keeping.
    return {
        "in_proj": (2 * (m.inner + m.width), m.hidden),
        "memory_gates": (2 * m.heads, m.hidden),
        "memory_gates_bias": (2 * m.heads,),
        "state_norm": (m.width,),
        "out_proj": (m.hidden, m.width),
    }


_SHAPES: dict[str, Callable[[Mixer], Shapes]] = {
    "conv": _conv,
    "mamba": _state_space,
    "mamba2": _state_space,
    "delta": _delta,
    "kda": _kda,
    "rglru": _rglru,
    "lightning": _lightning,
    "mlstm": _mlstm,
}
_NEEDED = {
    "lightning": {"in_proj", "in_gate_proj", "state_rate", "state_norm", "out_proj"},
    "rglru": {
        *("in_proj", "in_gate_proj", "convolution", "state_rate", "out_proj"),
        *("read_gate", "read_gate_bias", "keep_gate", "keep_gate_bias"),
    },
    "delta": {"convolution", "step_bias", "state_rate", "state_norm", "out_proj"},
    "kda": {
        *("in_proj", "in_beta_proj"),
        *("convolution", "step_bias", "state_rate", "state_norm", "out_proj"),
    },
    "conv": {"in_proj", "convolution", "out_proj"},
    "mamba": {
        "in_proj",
        "convolution",
        "step_in_proj",
        "step_proj",
        "step_bias",
        "state_rate",
        "state_skip",
        "out_proj",
    },
    "mamba2": {"in_proj", "convolution", "step_bias", "state_rate", "state_skip", "out_proj"},
}


def _one_of(s: Structure, *choices: set[str]) -> set[str]:
    """The first set of roles of which the model has one; the last where it has none."""
    return next((each for each in choices if each & s.roles()), choices[-1])


def roles(s: Structure) -> tuple[set[str], set[str]]:
    """The roles that a layer with the mixer needs, and those that it may have."""
    needed = _NEEDED[s.mixer]
    if s.mixer == "delta":
        needed = needed | _one_of(
            s, {"joined_in_proj"}, {"grouped_in_proj", "grouped_step_proj"},
            {"in_proj", "in_gate_proj", "in_step_proj", "in_beta_proj"},
        )  # fmt: skip
    if s.mixer == "kda":
        narrow = {"gate_a_proj", "gate_b_proj", "step_a_proj", "step_b_proj"}
        needed = needed | _one_of(s, {"in_gate_proj", "in_step_proj"}, narrow)
    return needed, {*shapes(s)} - needed
