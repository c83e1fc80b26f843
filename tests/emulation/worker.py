"""A process whose CUDA device is an emulated one: asked for a case a line, it answers with how far its logits are off.

    {"architecture": "llama", "changes": {"head_dim": 80}, "quantization": "q4f16_1"}
    -> {"errors": {"prefill": 0.003, ...}, "rounding": 0, "noise": 1, "notes": {}, "kernels": 23}

The library is the stock target's, but for the compiler of its kernels. What is compared with is transformers (or the
case's own reference) on the numbers that the quantized weights stand for. `{"encoder": "bert", ...}` asks for hidden
states; with `"functions": true`, what engines call around the model is compared with NumPy, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LARGE = 1e-2  # of the logits' deviation: what a few layers in float16 are off by


class Worker:
    """The process, seen from a test. One that a case has ended is started anew for the next."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "worker.log"
        self._process: subprocess.Popen[str] | None = None

    def ask(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; AssertionError with the end of the log where the process ended."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "tests.emulation.worker"]
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(case)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self.close()  # it is ending: the next case shall not meet it
            raise AssertionError(self._log.read_text()[-3000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def main() -> None:
    from mlcbuild.emulation import cuda
    from tests.emulation import experts, products

    kinds = {"product": products.judged, "experts": experts.judged}
    with tempfile.TemporaryDirectory() as folder:
        cuda.load(Path(folder))
        for number, line in enumerate(sys.stdin):
            case, place = json.loads(line), Path(folder) / str(number)
            kind = next((kind for kind in kinds if kind in case), None)
            answer = kinds[kind](case[kind], place) if kind else judged(case, place)
            print(json.dumps(answer), flush=True)


def judged(asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Errors over the deviation of the reference's logits, by what was called.

    `rounding`: where one is large in 16 bits, the error of the reference itself in float16. `noise`: times what other
    models may be off by, the product says. `step`: how often each kernel is launched when one text is decoded.
    """
    from mlcbuild.emulation import cuda

    before = cuda.report()
    cuda.forget()
    cuda.check()
    kind = "encoder" in asked
    errors, rounding, noise, step = (_vectors(asked, folder), 0.0, 1, {}) if kind else _logits(asked, folder)
    report = cuda.report()
    ran = {name for name, count in report.launches.items() if count > before.launches.get(name, 0)}
    answer = {"errors": errors, "rounding": rounding, "noise": noise, "notes": report.notes, "kernels": len(ran)}
    return {**answer, "step": step}


def _vectors(asked: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Hidden states of one text, of a short one, and of two at once with holes in the mask."""
    import numpy as np
    import torch

    from mlcbuild.models.architecture import choose
    from mlcbuild.runtime.embedding import encoded
    from tests.architectures import test_encoder as encoders
    from tests.architectures.agreement import known_architectures
    from tests.emulation.build import build_library

    kind, ids = asked["encoder"], encoders.IDS
    if kind == "qwen3-embedding":
        reference, chosen, limits = encoders.transformers_qwen3(32), kind, {"prefill_chunk_size": 24}
    else:
        config = {**{**encoders.KIN, **encoders.NEWER}.get(kind, encoders.SIZES), **asked.get("changes", {})}
        reference = encoders.transformers_encoder(kind, **config)
        chosen, limits = choose(known_architectures(), {"model_type": kind}).name, {"max_batch_size": 2}
    built = encoders.Built(folder, asked["quantization"], reference, chosen, build_library, **limits)
    errors = {
        f"{n} tokens": encoders.error(built.model.hidden_states(ids[:n]), encoders.hidden_states(reference, ids[:n]))
        for n in (len(ids), 1)
    }
    if kind != "qwen3-embedding":
        mask = np.ones((2, 30), np.int32)
        mask[1, 20:] = mask[1, 7] = 0
        both = np.array([ids[:30], ids[20:50]])
        with torch.no_grad():
            expected = reference(torch.tensor(both), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
        seen = mask.astype(bool)
        errors["masked"] = encoders.error(encoded(built.model.network, both, mask)[seen], expected[seen])
    return errors


def _logits(asked: Mapping[str, Any], folder: Path) -> tuple[dict[str, float], float, int, dict[str, int]]:
    import dataclasses
    import functools

    import numpy as np

    from mlcbuild.emulation import cuda
    from mlcbuild.verify import engine_calls, execution
    from tests.architectures.agreement import IDS, Agreement, Case, error
    from tests.architectures.test_agreement import CASES
    from tests.emulation.build import build_library
    from tests.support.llama import QUANTIZATIONS

    case: Case = CASES[asked["architecture"]]
    config = _wide({**case.config, **asked.get("changes", {})})
    case = dataclasses.replace(case, config=config, overrides={**case.overrides, "max_batch_size": 3})
    case = dataclasses.replace(case, centres=asked.get("centres", case.centres))
    agreement = Agreement(
        case, asked["quantization"], folder, build=functools.partial(build_library, name=asked.get("target", "cuda"))
    )
    if asked.get("functions", False):
        engine_calls.run(agreement.network.library, QUANTIZATIONS[asked["quantization"]].model_dtype)
    expected = agreement.expected(IDS)
    session, errors = agreement.session(3), dict[str, float]()
    first = session.add()
    errors["verify"] = error(np.concatenate(list(session.all_logits(first, IDS))), expected)
    session.remove(first)
    first = session.add()
    chunks = [session.prefill(first, IDS[start:end]) for start, end in ((0, 5), (5, 17), (17, 32))]
    errors["prefill onto a history"] = error(np.stack(chunks), expected[[4, 16, 31]])
    steps = [session.decode(first, token) for token in IDS[32:-1]]
    before = cuda.report().launches
    steps.append(session.decode(first, IDS[-1]))
    launches = {name: count - before.get(name, 0) for name, count in cuda.report().launches.items()}
    errors["decode"] = error(np.stack(steps), expected[32:])
    session.remove(first)
    three = [session.add() for _ in range(3)]
    lengths = (1, 7, 30)
    errors["batch prefill"] = error(
        session.batch_prefill(three, [IDS[:length] for length in lengths]), expected[[n - 1 for n in lengths]]
    )
    errors["batch decode"] = error(session.batch_decode(three, [IDS[n] for n in lengths]), expected[[*lengths]])
    # References that are written in these tests compute in float32 only.
    large = case.reference is None and "f16" in asked["quantization"] and max(errors.values()) > LARGE
    rounding = error(agreement.rounded(IDS), expected) if large else 0.0
    return errors, rounding, execution.noise(agreement.structure), launches


def _wide(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with heads of at least 32, the least that GPU attention takes; many of the CPU's cases have less."""
    keys = ("hidden_size", "n_embd", "d_model", "kv_channels", "head_dim", "global_head_dim")
    latent = "qk_rope_head_dim" in config  # where `head_dim`, if it is there, is that part of a head
    doubled: dict[str, Any] = {
        key: 2 * config[key]
        for key in keys
        if key in config and (key != "head_dim" or (config[key] < 32 and not latent))
    }
    for key in ("rope_parameters", "rope_scaling"):  # factors, one for each pair of a head's numbers
        if "short_factor" in config.get(key, {}):
            factors = {name: 2 * config[key][name] for name in ("short_factor", "long_factor")}
            doubled[key] = {**config[key], **factors}
        # As many pairs of them turn by each of three positions.
        if "mrope_section" in config.get(key, {}) and not latent:
            doubled[key] = {**config[key], "mrope_section": [2 * size for size in config[key]["mrope_section"]]}
    if "text_config" in config:
        doubled["text_config"] = _wide(config["text_config"])
    return {**config, **doubled}


if __name__ == "__main__":
    main()
