"""How much faster a server is with many clients than with one.

    python benchmarks/serve.py                                         # random weights in the shape of TinyLlama 1.1B
    python benchmarks/serve.py dist/stories-cpu --clients 8 --tokens 128

It starts `mlcbuild serve`, and measures in turns, several times: one client that asks again and again, then many at
once, each as often. The figure is tokens a second of all clients together; texts are never ended by the model. What
counts is the ratio, taken from one run on one machine. Beside other work, the server's CPU time for a token says more,
best with `--threads 1`: threads that wait for each other take time, too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil

PROMPT = "Once upon a time there was"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="?", help="default: random weights of the 1.1B shape in q4f16_1")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text")
    parser.add_argument("--texts", type=int, default=4, help="texts of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the server's kernels (default: every core)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.package is None:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from benchmarks import shape_1b

            options.package = Path(made) / "shape-1b"
            shape_1b.write_package("q4f16_1", options.package, Path(made) / "scratch")
        measure(options)


def measure(options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "mlcbuild.cli", "serve", str(options.package), "--port", "0"]
    command += ["--sequences", str(options.clients)]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))
        try:
            rates: dict[int, list[float]] = {1: [], options.clients: []}
            costs: dict[int, list[float]] = {1: [], options.clients: []}  # CPU seconds of a token
            server = psutil.Process(process.pid)
            ends = ends_of(options.package)
            for _ in range(options.rounds):
                for clients, measured in rates.items():
                    before = sum(server.cpu_times()[:2])
                    measured.append(rate(url, options.package.name, clients, options, ends))
                    used = sum(server.cpu_times()[:2]) - before
                    costs[clients].append(used / (clients * options.texts * options.tokens))
        finally:
            process.terminate()
    for clients, measured in rates.items():
        shown = ", ".join(f"{each:.0f}" for each in measured)
        print(f"{clients:3} clients: {statistics.median(measured):7.1f} tokens/s together ({shown})", end="")
        print(f", {statistics.median(costs[clients]) * 1e3:.1f} ms of CPU for a token")
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    print(f"ratio, of the rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", end="")
    print(f"; of CPU: {', '.join(f'{one / many:.2f}' for one, many in zip(*costs.values(), strict=True))}")


def ends_of(package: Path) -> dict[str, int]:
    """A bias against the tokens that end a text."""
    (path,) = package.glob("*/mlc-chat-config.json")
    config = json.loads(path.read_text())
    eos = config.get("eos_token_id") or []
    ids = {*(eos if isinstance(eos, list) else [eos]), *config["conv_template"]["stop_token_ids"]}
    return {str(i): -100 for i in ids}


def rate(url: str, model: str, clients: int, options: argparse.Namespace, ends: dict[str, int]) -> float:
    """Tokens a second of all clients together."""

    def client(number: int) -> int:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as api:
            given = {"model": model, "max_tokens": options.tokens, "temperature": 0.8, "logit_bias": ends}
            answers = [
                api.completions.create(prompt=PROMPT, seed=100 * number + i, **given)  # type: ignore[call-overload]
                for i in range(options.texts)
            ]
        return sum(answer.usage.completion_tokens for answer in answers)

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        tokens = sum(pool.map(client, range(clients)))
        return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
