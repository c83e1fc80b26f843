"""What llama.cpp's own formats lose on the tokens that real.py judges ours on: run by a Python with llama-cpp-python.

    python llama_quality.py MODEL.gguf TOKENS.json FOLDER

TOKENS.json is a list of texts, each a list of token ids. The model in float32 is the reference, as it is for packages;
beside it stand Q4_0, with and without the embedding in 4 bits, and Q8_0. Prints JSON: by name, the file's bytes, and
means over all tokens predicted of the KL divergence (nats), of whether the likeliest token is the same, and the
perplexities.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FLOAT = ("F32", 0, False)  # name, llama.cpp's number of the file type, whether every matrix has that type
FORMATS = (("Q4_0", 2, False), ("Q4_0 pure", 2, True), ("Q8_0", 7, True))
_AT_ONCE = 64  # tokens, whose logits are in memory together


def main() -> None:
    model, tokens, folder = (Path(argument) for argument in sys.argv[1:])
    from llama_cpp import llama_cpp as api

    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, ctypes.c_void_p())
    api.llama_backend_init()
    texts = json.loads(tokens.read_text())
    reference = requantized(api, model, folder, FLOAT)
    found = {}
    for form in FORMATS:
        path = requantized(api, model, folder, form)
        found[f"llama.cpp {form[0]}"] = {"bytes": path.stat().st_size, **compared(api, path, reference, texts)}
    print(json.dumps(found))


def requantized(api: Any, model: Path, folder: Path, form: tuple[str, int, bool]) -> Path:
    """`model` in a format, made by llama.cpp. A tied embedding keeps more bits unless every matrix has them."""
    name, number, pure = form
    path = folder / f"{model.stem}-{name.replace(' ', '-')}.gguf"
    if not path.exists():
        options = api.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.pure = number, True, pure
        if api.llama_model_quantize(str(model).encode(), str(path).encode(), ctypes.byref(options)):
            raise SystemExit(f"llama.cpp could not make {name} of {model}")
    return path


def compared(api: Any, model: Path, reference: Path, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    sums, count = np.zeros(4), 0
    readers = [Reader(api, path, max(map(len, texts))) for path in (model, reference)]
    for ids in texts:
        for start, (q, p) in zip(range(0, len(ids), _AT_ONCE), zip(*(reader.logits(ids) for reader in readers))):  # noqa: B905
            following = np.asarray(ids[start + 1 : start + 1 + len(q)])
            q, p = (_log_softmax(side[: len(following)]) for side in (q, p))
            rows = np.arange(len(following))
            sums += [
                float((np.exp(p) * (p - q)).sum()),
                float((q.argmax(-1) == p.argmax(-1)).sum()),
                -float(q[rows, following].sum()),
                -float(p[rows, following].sum()),
            ]
            count += len(following)
    kl, agreed, surprise, of_reference = sums / count
    return {
        "kl": kl,
        "top1_agreement": agreed,
        "perplexity": float(np.exp(surprise)),
        "reference_perplexity": float(np.exp(of_reference)),
    }


class Reader:
    """A model and its KV cache, which is float32, too."""

    def __init__(self, api: Any, path: Path, longest: int) -> None:
        self._api = api
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = longest + _AT_ONCE, _AT_ONCE, _AT_ONCE
        parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(model, parameters)
        self._width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def logits(self, ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(_AT_ONCE, 0, 1)
        for start in range(0, len(ids), _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            batch.n_tokens = len(some)
            for i, token in enumerate(some):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, 1
                batch.seq_id[i][0] = 0
            if api.llama_decode(self._context, batch):
                raise SystemExit("llama_decode failed")
            yield np.ctypeslib.as_array(api.llama_get_logits(self._context), (len(some), self._width)).copy()
        api.llama_batch_free(batch)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


if __name__ == "__main__":
    main()
