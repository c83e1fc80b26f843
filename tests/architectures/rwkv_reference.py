"""RWKV-5 and RWKV-6 in plain torch, token by token, from Peng et al., arXiv 2404.05892 (Eagle and Finch).

Tensor names are those of the checkpoints on the hub. transformers has neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

HEAD, MIX, DECAY = 16, 32, 64  # head size; widths of RWKV-6's low-rank products for every hidden size but 4096

Shapes = dict[str, tuple[int, ...]]


def shapes_5(config: Mapping[str, Any]) -> Shapes:
    h, inner = config["hidden_size"], config["intermediate_size"]
    mixes = {f"attention.time_mix_{name}": (1, 1, h) for name in ("gate", "key", "value", "receptance")}
    mixes |= {f"feed_forward.time_mix_{name}": (1, 1, h) for name in ("key", "receptance")}
    own: Shapes = {"attention.time_decay": (h // HEAD, HEAD), "attention.time_faaaa": (h // HEAD, HEAD), **mixes}
    return _shapes(config, h, inner, own)


def shapes_6(config: Mapping[str, Any]) -> Shapes:
    h, inner = config["hidden_size"], config["intermediate_size"]
    own: Shapes = {f"attention.time_maa_{name}": (1, 1, h) for name in "xwkvrg"}
    own |= {f"feed_forward.time_maa_{name}": (1, 1, h) for name in "kr"}
    own |= {"attention.time_maa_w1": (h, 5 * MIX), "attention.time_maa_w2": (5, MIX, h)}
    own |= {"attention.time_decay_w1": (h, DECAY), "attention.time_decay_w2": (DECAY, h)}
    own |= {"attention.time_decay": (1, 1, h), "attention.time_faaaa": (h // HEAD, HEAD)}
    return _shapes(config, h, inner, own)


def _shapes(config: Mapping[str, Any], h: int, inner: int, own: Shapes) -> Shapes:
    layer = dict(own)
    layer |= {f"attention.{name}.weight": (h, h) for name in ("receptance", "key", "value", "gate", "output")}
    layer |= {"feed_forward.key.weight": (inner, h), "feed_forward.receptance.weight": (h, h)}
    layer |= {"feed_forward.value.weight": (h, inner)}
    layer |= {f"{norm}.{part}": (h,) for norm in ("ln1", "ln2", "attention.ln_x") for part in ("weight", "bias")}
    found: Shapes = {"rwkv.embeddings.weight": (config["vocab_size"], h), "head.weight": (config["vocab_size"], h)}
    for norm in ("rwkv.blocks.0.pre_ln", "rwkv.ln_out"):
        found |= {f"{norm}.weight": (h,), f"{norm}.bias": (h,)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"rwkv.blocks.{i}.{name}": shape for name, shape in layer.items()}
    return found


def logits_5(config: Mapping[str, Any], w: Mapping[str, Any], ids: list[int]) -> Any:
    return _logits(config, w, ids, _time_mixing_5)


def logits_6(config: Mapping[str, Any], w: Mapping[str, Any], ids: list[int]) -> Any:
    return _logits(config, w, ids, _time_mixing_6)


def _logits(config: Mapping[str, Any], w: Mapping[str, Any], ids: list[int], mixing: Callable[..., Any]) -> Any:
    import torch
    from torch.nn.functional import layer_norm

    h, heads, every = config["hidden_size"], config["hidden_size"] // HEAD, config["rescale_every"]
    w = {name: values.double() for name, values in w.items()}

    def norm(x: Any, name: str) -> Any:
        return layer_norm(x, (h,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    layers = range(config["num_hidden_layers"])
    before = [[torch.zeros(h, dtype=torch.double) for _ in range(2)] for _ in layers]
    states = [torch.zeros(heads, HEAD, HEAD, dtype=torch.double) for _ in layers]  # [key, value] of each head
    rows = []
    for token in ids:
        x = norm(w["rwkv.embeddings.weight"][token], "rwkv.blocks.0.pre_ln")
        for i in layers:
            name = f"rwkv.blocks.{i}."
            mine = {key.removeprefix(name): values for key, values in w.items() if key.startswith(name)}
            a = norm(x, f"{name}ln1")
            # Hidden states are halved now and then, as the checkpoints' own code does; so is what is added to them.
            halved = 0.5 ** (i // every) if every else 1.0
            out, states[i] = mixing(mine, a, before[i][0], states[i])
            x = x + halved * out
            f = norm(x, f"{name}ln2")
            x = x + halved * _channel_mixing(mine, f, before[i][1])
            x = x / 2 if every and (i + 1) % every == 0 else x
            before[i] = [a, f]
        rows.append(w["head.weight"] @ norm(x, "rwkv.ln_out"))
    return torch.stack(rows)


def _channel_mixing(p: Mapping[str, Any], x: Any, before: Any) -> Any:
    """RWKV-5 has mu of x itself; RWKV-6 has mu of what came before, 1 - mu in the other notation."""
    names = {"key": "k", "receptance": "r"}
    if "feed_forward.time_mix_key" in p:
        mu = {name: p[f"feed_forward.time_mix_{name}"].flatten() for name in names}
    else:
        mu = {name: 1 - p[f"feed_forward.time_maa_{short}"].flatten() for name, short in names.items()}
    mixed = {name: x * mu[name] + before * (1 - mu[name]) for name in names}
    inner = (p["feed_forward.key.weight"] @ mixed["key"]).relu() ** 2
    return (p["feed_forward.receptance.weight"] @ mixed["receptance"]).sigmoid() * (
        p["feed_forward.value.weight"] @ inner
    )


def _time_mixing_5(p: Mapping[str, Any], x: Any, before: Any, state: Any) -> tuple[Any, Any]:
    mixed = {}
    for name in ("receptance", "key", "value", "gate"):
        mu = p[f"attention.time_mix_{name}"].flatten()
        mixed[name] = x * mu + before * (1 - mu)
    decay = (-p["attention.time_decay"].exp()).exp()
    return _attend(p, mixed, decay, state)


def _time_mixing_6(p: Mapping[str, Any], x: Any, before: Any, state: Any) -> tuple[Any, Any]:
    dx = before - x
    inner = ((x + dx * p["attention.time_maa_x"].flatten()) @ p["attention.time_maa_w1"]).tanh().reshape(5, MIX)
    mixed = {}
    for part, (name, short) in enumerate(
        (("decay", "w"), ("key", "k"), ("value", "v"), ("receptance", "r"), ("gate", "g"))
    ):
        more = inner[part] @ p["attention.time_maa_w2"][part]
        mixed[name] = x + dx * (p[f"attention.time_maa_{short}"].flatten() + more)
    change = (mixed["decay"] @ p["attention.time_decay_w1"]).tanh() @ p["attention.time_decay_w2"]
    decay = (-(p["attention.time_decay"].flatten() + change).exp()).exp()
    return _attend(p, mixed, decay.reshape(-1, HEAD), state)


def _attend(p: Mapping[str, Any], mixed: Mapping[str, Any], decay: Any, state: Any) -> tuple[Any, Any]:
    """Each head by itself: r (S + diag(u) kᵀv), S <- diag(w) S + kᵀv; the norm is that of x / 8 with 1e-5."""
    import torch
    from torch.nn.functional import group_norm, silu

    r, k, v, g = (p[f"attention.{name}.weight"] @ mixed[name] for name in ("receptance", "key", "value", "gate"))
    heads = len(state)
    r, k, v = (each.reshape(heads, HEAD) for each in (r, k, v))
    new = torch.einsum("hk,hv->hkv", k, v)
    out = torch.einsum("hk,hkv->hv", r, state + p["attention.time_faaaa"][:, :, None] * new)
    state = decay[:, :, None] * state + new
    weight, bias = p["attention.ln_x.weight"], p["attention.ln_x.bias"]
    out = group_norm(out.reshape(1, -1) / 8, heads, weight, bias, 1e-5)[0]
    return p["attention.output.weight"] @ (out * silu(g)), state
