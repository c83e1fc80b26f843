"""What a package needs of a device's memory, computed from what it is: upstream types these figures by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mlcbuild.publishing.package import Package

MIB = 2**20
_PAGE = 16  # tokens of a page of the KV cache, as MLC and WebLLM allocate it
_LOW_RESOURCE = 4_000 * MIB  # bytes: what a browser on a phone or an old laptop can be expected to give
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Memory:
    """Bytes of one chat: a single sequence as long as the context window."""

    parameters: int
    kv_cache: int
    temporary: int  # the most that any function of the library allocates while it runs

    @property
    def total(self) -> int:
        return self.parameters + self.kv_cache + self.temporary

    @property
    def megabytes(self) -> float:
        """As WebLLM writes it: of 2^20 bytes, two digits."""
        return round(self.total / MIB, 2)

    @property
    def low_resource(self) -> bool:
        return self.total < _LOW_RESOURCE


def memory(package: Package, context: int | None = None) -> Memory:
    """The figures of a package; `context` tokens in place of its own window."""
    index = json.loads((package.weights / "tensor-cache.json").read_bytes())
    parameters = sum(record["nbytes"] for shard in index["records"] for record in shard["records"])
    usage = package.metadata.get("memory_usage") or {}
    return Memory(parameters, _kv_cache(package, context), max(usage.values(), default=0))


def _kv_cache(package: Package, context: int | None) -> int:
    """2 (keys and values) * layers * heads * head_dim * tokens, in the model's dtype.

    With a sliding window no more tokens are kept than it has. A recurrent model's state does not grow, and counts with
    the temporary memory.
    """
    shape = package.metadata.get("kv_cache") or {}
    if not shape or package.metadata.get("kv_state_kind") not in ("kv_cache", "hybrid"):
        return 0
    window = package.metadata.get("sliding_window_size", -1)
    tokens = context or package.metadata["context_window_size"]
    if window > 0:
        tokens = min(tokens, window) if tokens > 0 else window
    tokens = -(-tokens // _PAGE) * _PAGE
    size = _BYTES[package.quantization["model_dtype"]]
    heads = shape["num_key_value_heads"]
    return int(2 * shape["num_hidden_layers"] * heads * shape["head_dim"] * tokens * size)
