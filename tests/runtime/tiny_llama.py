"""A two-layer llama three times over: transformers' own, a library made with TVM's stock parts, and a weights folder.

The library has the functions of the contract and MLC's parameter names, but none of mlcbuild's compiler or kernels: the
runtime must run libraries that somebody else built.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
CONTEXT, CHUNK, BATCH = 96, 24, 3
EPSILON, THETA = 1e-5, 10000.0

Arrays = Mapping[str, npt.NDArray[np.float32]]


def transformers_model(vocab_size: int) -> Any:
    """A random LlamaForCausalLM whose logits differ by much more than rounding, norm weights included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=EPSILON,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def mlc_parameters(model: Any) -> dict[str, npt.NDArray[np.float32]]:
    """The model's parameters under MLC's names, in MLC's order."""
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    joined = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
        "input_layernorm": ("input_layernorm",),
        "post_attention_layernorm": ("post_attention_layernorm",),
    }
    parameters = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, sources in joined.items():
            parts = [state[f"{prefix}.{source}.weight"] for source in sources]
            parameters[f"{prefix}.{name}.weight"] = np.concatenate(parts)
    return {**parameters, **{name: state[name] for name in ("model.norm.weight", "lm_head.weight")}}


def write_weights(folder: Path, parameters: Arrays, alignment: int = 64) -> None:
    """One shard of raw float32 tensors and its tensor-cache.json."""
    folder.mkdir(parents=True, exist_ok=True)
    data, records = bytearray(), []
    for name, array in parameters.items():
        data += bytes(-len(data) % alignment)
        record = {"name": name, "shape": list(array.shape), "dtype": "float32", "format": "raw"}
        records.append({**record, "nbytes": array.nbytes, "byteOffset": len(data)})
        data += array.astype(np.float32).tobytes()
    write_index(folder, bytes(data), records)


def write_index(folder: Path, data: bytes, records: list[dict[str, Any]]) -> None:
    (folder / "params_shard_0.bin").write_bytes(data)
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": len(data)}
    shard |= {"md5sum": hashlib.md5(data).hexdigest(), "records": records}
    (folder / "tensor-cache.json").write_text(json.dumps({"metadata": {}, "records": [shard]}))


def build_library(path: Path) -> None:
    """Compile the model's library to `path`, unscheduled."""
    import tvm
    from tvm import relax

    target = tvm.target.Target({"kind": "llvm"})
    with target, tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        module, parameters = _export(target)
        builder = relax.BlockBuilder(module)
        with builder.function("_metadata", params=[]):
            builder.emit_func_output(tvm.ir.StringImm(json.dumps(_metadata(parameters))))
        executable = tvm.compile(builder.get(), target)

    def link(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        flags = ["-target", "x86_64-linux-gnu.2.28", "-shared", "-Wl,-z,undefs", "-s"]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, "-o", output, *objects], check=True)

    executable.export_library(str(path), fcompile=link)


def _metadata(parameters: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "quantization": "q0f32",
        "context_window_size": CONTEXT,
        "sliding_window_size": -1,
        "attention_sink_size": -1,
        "prefill_chunk_size": CHUNK,
        "tensor_parallel_shards": 1,
        "kv_state_kind": "kv_cache",
        "max_batch_size": BATCH,
        "params": [
            {"name": name, "shape": [n if isinstance(n, int) else n.name for n in p.shape], "dtype": str(p.dtype)}
            for name, p in parameters
        ],
    }


def _export(target: Any) -> tuple[Any, Any]:
    import tvm
    from tvm import relax
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import op
    from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

    def norm() -> Any:
        return nn.RMSNorm(HIDDEN, -1, EPSILON, bias=False)

    class Attention(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.qkv_proj = nn.Linear(HIDDEN, QKV, bias=False)
            self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

        def forward(self, x: Any, cache: Any, layer: int) -> Any:
            b, s, _ = x.shape
            qkv = op.reshape(self.qkv_proj(x), (b, s, HEADS + 2 * KV_HEADS, HEAD_DIM))
            out = cache.attention_with_fused_qkv(layer, qkv, HEADS, sm_scale=HEAD_DIM**-0.5)
            return self.o_proj(op.reshape(out, (b, s, HEADS * HEAD_DIM)))

    class FeedForward(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.gate_up_proj = nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False)
            self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

        def forward(self, x: Any) -> Any:
            gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
            return self.down_proj(op.silu(gate) * up)

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.self_attn = Attention()
            self.mlp = FeedForward()
            self.input_layernorm = norm()
            self.post_attention_layernorm = norm()

        def forward(self, x: Any, cache: Any, layer: int) -> Any:
            x = x + self.self_attn(self.input_layernorm(x), cache, layer)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Decoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.embed_tokens = nn.Embedding("vocab_size", HIDDEN)
            self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
            self.norm = norm()

        def forward(self, x: Any, cache: Any) -> Any:
            for number, layer in enumerate(self.layers):
                x = layer(x, cache, number)
            return self.norm(x)

    class Llama(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model = Decoder()
            self.lm_head = nn.Linear(HIDDEN, "vocab_size", bias=False)

        def embed(self, ids: Any) -> Any:
            return self.model.embed_tokens(ids)

        def prefill(self, x: Any, cache: Any) -> Any:
            def last(t: Any) -> Any:
                return tvm.te.compute((1, 1, HIDDEN), lambda i, _, k: t[i, t.shape[1] - 1, k], name="last")

            return self.lm_head(op.tensor_expr_op(last, "last", [self.model(x, cache)])), cache

        def decode(self, x: Any, cache: Any) -> Any:
            return self.lm_head(self.model(x, cache)), cache

        def batch_prefill(self, x: Any, logit_positions: Any, cache: Any) -> Any:
            return self.lm_head(op.take(self.model(x, cache), logit_positions, axis=1)), cache

        def batch_decode(self, x: Any, cache: Any) -> Any:
            return self.decode(x, cache)

        def batch_verify(self, x: Any, cache: Any) -> Any:
            return self.decode(x, cache)

        def create_tir_paged_kv_cache(self, batch: Any, total: Any, chunk: Any, page: Any, sliding: Any) -> Any:
            return TIRPagedKVCache(
                attn_kind="mha",
                max_batch_size=batch,
                max_total_seq_len=total,
                prefill_chunk_size=chunk,
                page_size=page,
                support_sliding_window=sliding,
                layer_partition=relax.ShapeExpr([0, LAYERS]),
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV_HEADS,
                qk_head_dim=HEAD_DIM,
                v_head_dim=HEAD_DIM,
                mla_original_qk_head_dim=0,
                mla_original_v_head_dim=0,
                rope_mode=RopeMode.NORMAL,
                rope_scale=1,
                rope_theta=int(THETA),
                rope_scaling={},
                rope_ext_factors=relax.prim_value(0),
                rotary_dim=HEAD_DIM,
                enable_disaggregation=False,
                dtype="float32",
                target=target,
            )

    packed = {"param_mode": "packed", "effect_mode": "none"}
    cache = nn.spec.Object(object_type=PagedKVCache)

    def tensor(*shape: Any) -> Any:
        return nn.spec.Tensor([*shape, HIDDEN], "float32")

    positions = nn.spec.Tensor(["batch_size"], "int32")
    sizes = dict.fromkeys(("batch", "total", "chunk", "page", "sliding"), int)
    model = Llama()
    specification = nn.spec.ModuleSpec.from_raw(
        {
            "embed": {"ids": nn.spec.Tensor(["seq_len"], "int32"), "$": packed},
            "prefill": {"x": tensor(1, "seq_len"), "cache": cache, "$": packed},
            "decode": {"x": tensor(1, 1), "cache": cache, "$": packed},
            "batch_prefill": {"x": tensor(1, "seq_len"), "logit_positions": positions, "cache": cache, "$": packed},
            "batch_decode": {"x": tensor("batch_size", 1), "cache": cache, "$": packed},
            "batch_verify": {"x": tensor(1, "seq_len"), "cache": cache, "$": packed},
            "create_tir_paged_kv_cache": {**sizes, "$": {"param_mode": "none", "effect_mode": "none"}},
        },
        model,
    )
    module, parameters = model.export_tvm(spec=specification, allow_extern=False)
    return module, parameters
