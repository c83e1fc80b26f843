"""What is asked for wrongly, too much at once, or by nobody any more; and the command itself."""

from __future__ import annotations

import functools
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import Model
from mlcbuild.runtime.sampling import Sampling
from mlcbuild.serve.app import Server
from mlcbuild.serve.commands import serve
from mlcbuild.serve.engine import Engine, Job, Limits, Piece
from tests.serve.conftest import KEY, held
from tests.serve.test_answers import HI, MODEL, complete, wait_until


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON (or text) of an answer to a request as no well-behaved client would send it."""
    kept = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, kept)) as response:
            status, said = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, said = error.code, error.read()
    return status, json.loads(said) if said.startswith(b"{") else said.decode()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "sea " * 200}, r"the prompt has \d+ tokens, too many for this server's window of 96|do not fit"),
        ({"prompt": []}, "prompt.*should have at least 1 item"),
        ({"prompt": [5, 300]}, "token id 300 is not in this model's vocabulary of 300"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"top_p": 0.0}, "top_p is 0.0: expected a number above 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"extra_body": {"grammar": "x"}}, "grammar: Extra inputs are not permitted"),
        ({"suffix": "x"}, "suffix: Input should be null"),
        ({"stop": "x" * 1025}, "stop: String should have at most 1024 characters"),
        ({"prompt": ["a", "b"], "n": 8}, "the request asks for 16 texts; this server takes 15 at once"),
    ],
    ids=str,
)
def test_a_wrong_request_is_told_what_is_wrong(client: openai.OpenAI, settings: dict[str, Any], said: str) -> None:
    given = {"prompt": "The", **settings}
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, given.pop("prompt"), **given)
    message = error.value.body["message"]  # type: ignore[index]
    assert re.search(said, message), message


def test_roles_models_and_vectors_that_are_not_here(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="template chatml: no role `tool`; there are user, assistant"):
        tool: Any = [{"role": "tool", "content": "x"}]
        client.chat.completions.create(model=MODEL, messages=tool)
    with pytest.raises(openai.NotFoundError, match="no model `gpt-4` here; there are: tiny-cpu"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="tiny-cpu writes texts, it gives no vectors"):
        client.embeddings.create(model=MODEL, input="x")
    assert [model.id for model in client.models.list()] == [MODEL] == [client.models.retrieve(MODEL).id]


def test_what_is_no_request(address: str) -> None:
    url = f"{address}/v1/completions"
    status, said = ask(url, b"{oops")
    assert status == 400 and "Invalid JSON" in said["error"]["message"]
    assert ask(url, b"[]")[0] == 400
    status, said = ask(url, b"{}", **{"Content-Type": "text/plain"})  # what a page of another site could send
    assert status == 415 and said["error"]["message"] == "send JSON, with `Content-Type: application/json`"
    status, said = ask(url, b" " * (2**22 + 1))
    assert status == 413 and said["error"]["message"] == "the request is longer than 4 MiB"
    assert ask(address, Host="evil.example") == (400, "Invalid host header")
    status, said = ask(f"{address}/v1/nothing")
    assert status == 404 and said["error"]["message"] == "there is nothing at /v1/nothing"
    status, said = ask(f"{address}/v1/models", b"{}")
    assert status == 405 and said["error"]["message"] == "/v1/models does not take POST"


def test_only_the_key_opens(address: str) -> None:
    status, said = ask(f"{address}/v1/models", Authorization="Bearer wrong")
    assert status == 401 and said["error"]["code"] == "invalid_api_key"
    assert ask(f"{address}/metrics", Authorization="")[0] == 401
    assert ask(f"{address}/metrics", Authorization="", Host="127.0.0.1:/health?")[0] in (400, 401)
    assert ask(f"{address}/metrics", Authorization=f"bearer {KEY}")[0] == 200
    assert ask(f"{address}/health", Authorization="") == (200, {"status": "ok", "models": [MODEL]})
    status, page = ask(address, Authorization="")
    assert status == 200 and "/v1/chat/completions" in page


def test_metrics_count_tokens_and_requests(client: openai.OpenAI, address: str) -> None:
    def read() -> dict[str, float]:
        lines = ask(f"{address}/metrics")[1].splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    complete(client, [5, 6, 7], max_tokens=4, logit_bias={"0": -100, "2": -100})
    after = read()
    for name, more in (
        ('mlcbuild_completion_tokens_total{model="tiny-cpu"}', 4),
        ('mlcbuild_prompt_tokens_total{model="tiny-cpu"}', 3),
        ('mlcbuild_requests_total{path="/v1/completions",status="200"}', 1),
        ('mlcbuild_running{model="tiny-cpu"}', 0),
    ):
        assert after[name] == before.get(name, 0) + more, name


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_that_nobody_waits_for_is_not_written(
    client: openai.OpenAI, address: str, engine: Engine, stream: bool
) -> None:
    cancelled, tokens = engine.counts["cancelled"], engine.counts["completion_tokens"]
    with held(engine):
        if stream:
            complete(client, "The", stream=True).close()
        else:
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps({"model": MODEL, "prompt": "The"}), headers)
            wait_until(lambda: engine.waiting)
            connection.close()
        wait_until(lambda: engine.waiting and all(job.cancelled for job in engine._waiting))
    wait_until(lambda: not engine.waiting)
    assert (engine.counts["cancelled"], engine.counts["completion_tokens"]) == (cancelled + 1, tokens)


def test_a_text_is_given_up_while_it_is_written(engine: Engine) -> None:
    """Its place is free for the next one."""
    pieces: list[Piece | MlcBuildError] = []

    def tell(piece: Piece | MlcBuildError) -> None:
        pieces.append(piece)
        job.cancelled = len(pieces) == 3

    job = Job(engine.model.writer([5] * 20, 70, (), Sampling(logit_bias={0: -100, 2: -100})), tell)
    engine.submit([job])
    wait_until(lambda: job.cancelled and not engine.running)
    assert len(pieces) == 3 and len(job.writer.tokens) == 3


def test_more_than_may_wait_is_refused(client: openai.OpenAI, engine: Engine) -> None:
    with ThreadPoolExecutor() as pool:
        with held(engine):
            waiting = pool.submit(complete, client, "The", n=15, max_tokens=1)  # 3 places, and 12 that wait
            wait_until(lambda: engine.waiting == 15)
            with pytest.raises(openai.RateLimitError, match="15 requests wait already: try again later") as error:
                complete(client, "The")
            assert error.value.response.headers["retry-after"] == "1"
        assert len(waiting.result().choices) == 15


def test_an_error_of_the_engine_ends_its_texts_and_not_the_server(
    client: openai.OpenAI, engine: Engine, tiny: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Piece | MlcBuildError] = []
    engine.submit([Job(engine.model.writer([999], 3), told.append)])  # the application refuses such a token
    wait_until(lambda: told)
    assert "token id 999 is not in this model's vocabulary of 300" in str(told[0])
    assert complete(client, "The").choices[0].text == tiny.generate("The", max_tokens=20)
    assert "token id 999" in capfd.readouterr().err


def test_where_no_cache_can_be_made_all_are_told(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    """Those that wait, too, or the engine would try for ever."""
    other = Engine(engine.model, Limits(sequences=3))
    other._most = 1000
    told: list[Piece | MlcBuildError] = []
    other.submit([Job(engine.model.writer([5], 3), told.append) for _ in range(2)])
    wait_until(lambda: len(told) == 2)
    assert [re.search("compiled for at most 3 sequences at once", str(each)) for each in told].count(None) == 0
    other.close()
    assert other.waiting == 0


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_complete_when_the_server_ends(
    client: openai.OpenAI, engine: Engine, server: Server, stream: bool
) -> None:
    """A client is told, with a status or in its stream."""
    wait_until(lambda: not server._going)
    with ThreadPoolExecutor() as pool, held(engine):
        begun = pool.submit(lambda: list(complete(client, "The", stream=stream)))
        wait_until(lambda: server._going)
        server.end()
        with pytest.raises(openai.APIError, match="the server ends before the answer is complete") as error:
            begun.result()
    assert stream or (isinstance(error.value, openai.InternalServerError) and error.value.status_code == 503)
    wait_until(lambda: not server._going)


def test_the_command_serves_until_ctrl_c(tiny_package: Path, tiny: Model) -> None:
    command = [sys.executable, "-m", "mlcbuild.cli", "serve", str(tiny_package), "--port", "0"]
    environment = {**os.environ, "MLCBUILD_API_KEY": KEY}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # whatever the shell has told the tests
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heard) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.]+:\d+", line)))
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            assert complete(client, "The").choices[0].text == tiny.generate("The", max_tokens=20)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130, process.stderr.read()


def test_packages_that_cannot_be_served(tiny_package: Path) -> None:
    with pytest.raises(MlcBuildError, match="two packages are called tiny-cpu; rename one of the folders"):
        serve([tiny_package, tiny_package])
    with pytest.raises(MlcBuildError, match="--sequences is 0: expected 1 or more"):
        serve([tiny_package], sequences=0)
    with pytest.raises(MlcBuildError, match="--port is 70000: expected 65535 or less"):
        serve([tiny_package], port=70000)
