"""A server under load: many clients at once, some of which go away, send nonsense or are killed.

python benchmarks/load.py dist/stories-cpu --clients 32 --seconds 300

It starts `mlcbuild serve`. Clients ask at temperature 0 and compare with what was written for them alone; others leave
in the middle of a stream, are killed, or send what must be refused. Memory is looked at all the time, and in the end
Ctrl-C comes while everybody still asks. The status is 1 where an answer or an error was not the right one, memory
grew (in four minutes or more), or the server took longer than `--ended` to end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import openai
import psutil

WORDS = ("Once", "upon", "a", "time", "there", "was", "the", "sea", "and", "little", "red", "house", "under", "trees")
TOKENS = 24
CLIENT = """
import socket, sys
host, port, request = sys.argv[1:]
server = socket.create_connection((host, int(port)))
server.sendall(request.encode())
while server.recv(4096): pass
"""  # one that can be killed: a process of its own
NEAR = 0.02  # of the answers may differ from those of a text alone: two tokens were as likely as each other
GROWTH = 0.05  # of the memory, from the second fifth of the time to the last
LONG = 240  # seconds: in less, what was used once and is kept for the next time is most of it


class Load:
    """What clients do, what went wrong, and how often each thing was done."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.url, self.model = url, model
        dice = random.Random(seed)
        self.prompts = [" ".join(dice.choices(WORDS, k=dice.randint(1, 9))) for _ in range(40)]
        self.alone: dict[str, str] = {}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ending = threading.Event()

    def ask(self, api: openai.OpenAI, prompt: str, stream: bool = False) -> openai.types.Completion:
        given = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": TOKENS, "stream": stream}
        return api.completions.create(**given)  # type: ignore[call-overload, no-any-return]

    def whole(self, api: openai.OpenAI, dice: random.Random) -> None:
        prompt = dice.choice(self.prompts)
        self._compare(prompt, self.ask(api, prompt).choices[0].text)

    def streamed(self, api: openai.OpenAI, dice: random.Random) -> None:
        prompt = dice.choice(self.prompts)
        self._compare(prompt, "".join(chunk.choices[0].text for chunk in self.ask(api, prompt, stream=True)))

    def _compare(self, prompt: str, text: str) -> None:
        if text != self.alone[prompt]:
            self.done["other text"] += 1

    def cancelled(self, api: openai.OpenAI, dice: random.Random) -> None:
        stream = self.ask(api, dice.choice(self.prompts), stream=True)
        for _, _ in zip(range(dice.randint(0, 6)), stream, strict=False):
            pass
        stream.close()  # type: ignore[attr-defined]

    def killed(self, api: openai.OpenAI, dice: random.Random) -> None:
        asked = {"model": self.model, "prompt": dice.choice(self.prompts), "max_tokens": 500, "stream": True}
        body, place = json.dumps(asked), self.url.removeprefix("http://")
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place}\r\nContent-Type: application/json\r\n"
        words = [*place.split(":"), f"{head}Content-Length: {len(body)}\r\n\r\n{body}"]
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", CLIENT, *words]) as client:
            time.sleep(dice.random())
            client.kill()

    def bad_json(self, api: openai.OpenAI, dice: random.Random) -> None:
        self._refused(b'{"model": ' + dice.randbytes(dice.randint(0, 50)), 400)

    def wrong_model(self, api: openai.OpenAI, dice: random.Random) -> None:
        self._refused(json.dumps({"model": "another", "prompt": "a"}).encode(), 404)

    def long_prompt(self, api: openai.OpenAI, dice: random.Random) -> None:
        text = " ".join(dice.choices(WORDS, k=1_000_000 // 5)).ljust(1_000_000)[:1_000_000]
        self._refused(json.dumps({"model": self.model, "prompt": text}).encode(), 400)

    def _refused(self, body: bytes, status: int) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/completions", body, headers)) as answer:
                found, said = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            found, said = error.code, error.read()
        if found != status or not json.loads(said)["error"]["message"]:
            self.wrong.append(f"{found} {said[:200]!r} and not {status}")

    def client(self, seed: int) -> None:
        """One that does one thing after another, until the end."""
        dice = random.Random(seed)
        kinds: dict[Callable[[openai.OpenAI, random.Random], None], int] = {
            self.whole: 40,
            self.streamed: 30,
            self.cancelled: 15,
            self.killed: 4,
            self.bad_json: 5,
            self.wrong_model: 5,
            self.long_prompt: 1,
        }
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="-", max_retries=0, timeout=120) as api:
            while not self.ending.is_set():
                (do,) = dice.choices(list(kinds), list(kinds.values()))
                try:
                    do(api, dice)
                    self.done[do.__name__] += 1
                except Exception as error:
                    if not self.ending.is_set():  # afterwards there is no server
                        self.wrong.append(f"{do.__name__}: {type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ended", type=float, default=2.0, help="seconds that the server may take to end")
    options = parser.parse_args()
    command = [sys.executable, "-m", "mlcbuild.cli", "serve", str(options.package), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "MLCBUILD_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(lines), daemon=True)
        reader.start()
        try:
            load, memory = under_load(url, options, psutil.Process(server.pid))
            start = time.monotonic()
            load.ending.set()
            server.send_signal(signal.SIGINT)
            server.wait(60)
            took = time.monotonic() - start
        finally:
            server.kill()
        reader.join(10)
    return report(load, memory, took, [line for line in errors if "Traceback" in line], options)


def under_load(url: str, options: argparse.Namespace, server: psutil.Process) -> tuple[Load, list[int]]:
    """What was done, and the server's memory, several times a second."""
    load = Load(url, options.package.name, options.seed)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as api:
        load.alone = {prompt: load.ask(api, prompt).choices[0].text for prompt in load.prompts}
    for number in range(options.clients):
        threading.Thread(target=load.client, args=(options.seed + number,), daemon=True).start()
    memory, end = list[int](), time.monotonic() + options.seconds
    while time.monotonic() < end:
        memory.append(server.memory_info().rss)
        time.sleep(0.2)
    return load, memory


def report(load: Load, memory: list[int], took: float, errors: list[str], options: argparse.Namespace) -> int:
    """Prints it; 0 where all is as it should be."""
    fifth = max(len(memory) // 5, 1)
    before, after = (statistics.median(part) for part in (memory[fifth : 2 * fifth], memory[-fifth:]))
    texts = load.done["whole"] + load.done["streamed"]
    print(", ".join(f"{name}: {count}" for name, count in load.done.most_common()))
    print(f"memory: {before / 1e6:.0f} MB in the second fifth of the time, {after / 1e6:.0f} MB in the last")
    print(f"Ctrl-C: {took:.2f} s")
    faults = [*load.wrong[:10], *errors[:3]]
    if load.done["other text"] > NEAR * texts:
        faults.append(f"{load.done['other text']} of {texts} texts are not those that are written alone")
    if options.seconds >= LONG and after > (1 + GROWTH) * before:
        faults.append("memory grew")
    if took > options.ended:
        faults.append("it took too long to end")
    for fault in faults:
        print(f"WRONG: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
