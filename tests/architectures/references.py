"""Models that transformers has no class for, written in plain torch from what their publishers document.

Each is the shapes of a checkpoint's tensors and the logits that such tensors give; the blocks that they have in common
come first. Nothing here knows of mlcbuild.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensor = Any  # torch.Tensor: torch has no types for what is done with one
Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def rotated(x: Tensor, theta: float = 10000.0, width: int | None = None, neighbours: bool = False) -> Tensor:
    """x [n, heads, dim] at positions 0 to n - 1, the first `width` dimensions turned (arXiv 2104.09864)."""
    n, _, dim = x.shape
    width = width or dim
    angle = torch.arange(n)[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    sine, cosine = angle.sin()[:, None], angle.cos()[:, None]
    turned = x[..., :width]
    a, b = (turned[..., ::2], turned[..., 1::2]) if neighbours else turned.chunk(2, -1)
    pair = (a * cosine - b * sine, b * cosine + a * sine)
    joined = torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1)
    return torch.cat([joined, x[..., width:]], -1)


def slopes(heads: int) -> list[float]:
    """Of linear biases (arXiv 2108.12409): a geometric sequence, and what it lacks from one twice as long."""
    power = 2 ** int(math.log2(heads))
    own = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return own if power == heads else own + slopes(2 * power)[::2][: heads - power]


def attended(q: Tensor, k: Tensor, v: Tensor, alibi: bool = False) -> Tensor:
    """Causal attention of q [n, heads, dim] on k, v [n, kv_heads, dim]: [n, heads * dim]."""
    n, heads, dim = q.shape
    k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
    if alibi:
        scores = scores + torch.tensor(slopes(heads))[:, None, None] * torch.arange(n)
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)


def swiglu(x: Tensor, tensors: Tensors, gate: str, up: str, down: str) -> Tensor:
    return linear(torch.nn.functional.silu(linear(x, tensors, gate)) * linear(x, tensors, up), tensors, down)


def llama_shapes(config: Config, biases: tuple[str, ...] = (), norm_bias: bool = False) -> Shapes:
    """A checkpoint with llama's tensors; `biases` are those of attention that have one."""
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], kv_width(config)
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            shapes[f"{layer}self_attn.{name}.weight"] = (rows, hidden)
            if name in biases:
                shapes[f"{layer}self_attn.{name}.bias"] = (rows,)
        shapes |= {f"{layer}mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    if norm_bias:
        shapes |= {name.replace("weight", "bias"): shape for name, shape in shapes.items() if "norm" in name}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def kv_width(config: Config) -> int:
    heads: int = config["num_attention_heads"]
    return int(config["hidden_size"] // heads * config.get("num_key_value_heads", heads))


def llama_like(config: Config, t: Tensors, ids: list[int], norm: Callable[[Tensor, str], Tensor] | None = None,
               embedding: float = 1.0, residual: float = 1.0, head: float = 1.0,
               alibi: bool = False) -> Tensor:  # fmt: skip
    """Logits of a decoder with llama's tensors; the scales are MiniCPM's (arXiv 2404.06395, table 7)."""
    dim = config["hidden_size"] // config["num_attention_heads"]

    def rms(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, t[f"{name}.weight"], config["rms_norm_eps"])

    norm = norm or rms
    x = t["model.embed_tokens.weight"][torch.tensor(ids)] * embedding
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = norm(x, f"{layer}input_layernorm")
        q, k, v = (linear(normed, t, f"{layer}self_attn.{name}_proj").unflatten(-1, (-1, dim)) for name in "qkv")
        turned = (q, k) if alibi else (rotated(q), rotated(k))
        x = x + residual * linear(attended(*turned, v, alibi), t, f"{layer}self_attn.o_proj")
        mlp = [f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")]
        x = x + residual * swiglu(norm(x, f"{layer}post_attention_layernorm"), t, *mlp)
    last = norm(x, "model.norm") * head
    return last @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


def internlm_shapes(config: Config) -> Shapes:
    return llama_shapes(config, ("q_proj", "k_proj", "v_proj", "o_proj") if config["bias"] else ())


def bitnet_shapes(config: Config) -> Shapes:
    shapes = {**llama_shapes(config)}
    for i in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{i}.self_attn.attn_sub_norm.weight"] = (config["hidden_size"],)
        shapes[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = (config["intermediate_size"],)
    return shapes


def bitnet(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    """transformers' model, whose matrices in layers are given inputs rounded as its ActQuant rounds them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def rounded(_: torch.nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        scale = 127 / given[0].abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
        return (given[0] * scale).round().clamp(-128, 127) / scale

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), attn_implementation="eager").float().eval()
    model.load_state_dict(dict(t))
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(rounded)
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def minicpm(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    head = config["dim_model_base"] / config["hidden_size"]
    return llama_like(config, t, ids, embedding=config["scale_emb"], residual=depth, head=head)


def orion_shapes(config: Config) -> Shapes:
    return llama_shapes(config, norm_bias=True)


def orion(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], config["rms_norm_eps"])

    return llama_like(config, t, ids, norm)


def baichuan_shapes(config: Config) -> Shapes:
    shapes = llama_shapes(config)
    for i in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{i}.self_attn.W_pack.weight"] = (3 * config["hidden_size"], config["hidden_size"])
        for name in "qkv":
            del shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"]
    return shapes


def baichuan(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    """Queries, keys and values in one matrix; version 2 (a vocabulary of 125,696) norms its head's rows.

    The 13B models' configs have no `max_position_embeddings`, and they have linear biases.
    """
    split = dict(t)
    for i in range(config["num_hidden_layers"]):
        parts = t[f"model.layers.{i}.self_attn.W_pack.weight"].chunk(3)
        split |= {f"model.layers.{i}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
    if config["vocab_size"] == 125696:
        split["lm_head.weight"] = torch.nn.functional.normalize(t["lm_head.weight"])
    return llama_like(config, split, ids, alibi="max_position_embeddings" not in config)


def internlm2_shapes(config: Config) -> Shapes:
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], kv_width(config)
    vocab = config["vocab_size"]
    shapes: Shapes = {"model.tok_embeddings.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[f"{layer}attention.wqkv.weight"] = (hidden + 2 * kv, hidden)
        shapes[f"{layer}attention.wo.weight"] = (hidden, hidden)
        shapes |= {f"{layer}feed_forward.{name}.weight": (inner, hidden) for name in ("w1", "w3")}
        shapes[f"{layer}feed_forward.w2.weight"] = (hidden, inner)
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("attention_norm", "ffn_norm")}
    return {**shapes, "output.weight": (vocab, hidden)}


def internlm2(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    """wqkv's rows are, for each key-value head, its group's queries, then the key, then the value."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps = config["hidden_size"] // heads, config["rms_norm_eps"]
    x = t["model.tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, t[f"{layer}attention_norm.weight"], eps)
        groups = linear(normed, t, f"{layer}attention.wqkv").unflatten(-1, (kv_heads, -1, dim))
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        theta = config["rope_theta"]
        x = x + linear(attended(rotated(q, theta), rotated(k, theta), v), t, f"{layer}attention.wo")
        mlp = [f"{layer}feed_forward.{name}" for name in ("w1", "w3", "w2")]
        x = x + swiglu(rms_norm(x, t[f"{layer}ffn_norm.weight"], eps), t, *mlp)
    return linear(rms_norm(x, t["model.norm.weight"], eps), t, "output")


def qwen_shapes(config: Config) -> Shapes:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden), "transformer.ln_f.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        shapes[f"{layer}attn.c_attn.weight"] = (3 * hidden, hidden)
        shapes[f"{layer}attn.c_attn.bias"] = (3 * hidden,)
        shapes[f"{layer}attn.c_proj.weight"] = (hidden, hidden)
        shapes |= {f"{layer}mlp.{name}.weight": (inner, hidden) for name in ("w1", "w2")}
        shapes[f"{layer}mlp.c_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("ln_1", "ln_2")}
    return {**shapes, "lm_head.weight": (vocab, hidden)}


def qwen(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    """Qwen technical report (arXiv 2309.16609): biases on queries, keys and values only; w2 is the gate."""
    dim, eps = config["kv_channels"], config["layer_norm_epsilon"]
    x = t["transformer.wte.weight"][torch.tensor(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        normed = rms_norm(x, t[f"{layer}ln_1.weight"], eps)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part in linear(normed, t, f"{layer}attn.c_attn").chunk(3, -1))
        theta = config["rotary_emb_base"]
        x = x + linear(attended(rotated(q, theta), rotated(k, theta), v), t, f"{layer}attn.c_proj")
        mlp = [f"{layer}mlp.{name}" for name in ("w2", "w1", "c_proj")]
        x = x + swiglu(rms_norm(x, t[f"{layer}ln_2.weight"], eps), t, *mlp)
    return linear(rms_norm(x, t["transformer.ln_f.weight"], eps), t, "lm_head")


def chatglm_shapes(config: Config) -> Shapes:
    hidden, inner, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    rows = hidden + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: Shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes[f"{layer}self_attention.query_key_value.weight"] = (rows, hidden)
        shapes[f"{layer}self_attention.query_key_value.bias"] = (rows,)
        shapes[f"{layer}self_attention.dense.weight"] = (hidden, hidden)
        shapes[f"{layer}mlp.dense_h_to_4h.weight"] = (2 * inner, hidden)
        shapes[f"{layer}mlp.dense_4h_to_h.weight"] = (hidden, inner)
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    return {**shapes, "transformer.output_layer.weight": (vocab, hidden)}


def chatglm(config: Config, t: Tensors, ids: list[int]) -> Tensor:
    """ChatGLM2 and 3: one key-value head per group; neighbouring dimensions of each head's first half are turned."""
    dim, groups, eps = config["kv_channels"], config["multi_query_group_num"], config["layernorm_epsilon"]
    x = t["transformer.embedding.word_embeddings.weight"][torch.tensor(ids)]
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        normed = rms_norm(x, t[f"{layer}input_layernorm.weight"], eps)
        heads = linear(normed, t, f"{layer}self_attention.query_key_value").unflatten(-1, (-1, dim))
        q, k, v = heads.split([heads.shape[1] - 2 * groups, groups, groups], 1)
        q, k = (rotated(each, 10000.0 * config.get("rope_ratio", 1), dim // 2, neighbours=True) for each in (q, k))
        x = x + linear(attended(q, k, v), t, f"{layer}self_attention.dense")
        normed = rms_norm(x, t[f"{layer}post_attention_layernorm.weight"], eps)
        gate, up = linear(normed, t, f"{layer}mlp.dense_h_to_4h").chunk(2, -1)
        x = x + linear(torch.nn.functional.silu(gate) * up, t, f"{layer}mlp.dense_4h_to_h")
    x = rms_norm(x, t["transformer.encoder.final_layernorm.weight"], eps)
    return linear(x, t, "transformer.output_layer")
