"""The HTTP interface: routes, who may use them, and errors as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mlcbuild.errors import MlcBuildError
from mlcbuild.looks import dressed
from mlcbuild.serve import answers
from mlcbuild.serve.engine import Engine, QueueFull
from mlcbuild.serve.metrics import Metrics
from mlcbuild.serve.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, Refused, parse, several

MOST_BYTES = 4 * 2**20  # of a request
_PAGE = Path(__file__).parent / "page.html"
_OPEN = ("/", "/health")  # without a key
_PATIENCE = 10  # seconds: more than uvicorn has


class Server:
    """Packages by name, and what is done with a request."""

    def __init__(self, engines: Mapping[str, Engine], key: str | None = None) -> None:
        self._engines, self._key = engines, key
        self._metrics = Metrics(engines)
        self._tokenizing = asyncio.Semaphore(2)
        self._going: set[answers.Answer] = set()
        self._started = int(time.time())

    def app(self, hosts: list[str]) -> Starlette:
        """The application, for requests that name one of `hosts` (`*`: any): pages of other sites cannot send any."""
        routes = [
            Route("/", self._guarded(self._page)),
            Route("/health", self._guarded(self._health)),
            Route("/metrics", self._guarded(self._show_metrics)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self._embed), methods=["POST"]),
        ]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
        return Starlette(
            routes=routes, middleware=[trusted], exception_handlers={HTTPException: _missed, Exception: _failed}
        )

    def _guarded(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """`answer` for whoever has the key; errors as JSON; counted."""

        async def guarded(request: Request) -> Response:
            start = time.perf_counter()
            try:
                self._check_key(request)
                response: Response = await answer(request)
            except QueueFull as error:
                response = _error(429, str(error), "queue_full")
                response.headers["retry-after"] = "1"
            except Refused as error:
                response = _error(error.status, str(error), error.code)
            except MlcBuildError as error:
                response = _error(400, str(error))
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            route = request.scope["route"].path
            self._metrics.answered(route, response.status_code, time.perf_counter() - start)
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        # Not request.url, which older versions of starlette make of what the client says in `Host`.
        if self._key is None or request.scope["path"] in _OPEN:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise Refused(
                401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`", "invalid_api_key"
            )

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(dressed(_PAGE.read_text(encoding="utf-8")))

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "models": list(self._engines)})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self._engines]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._engine(name)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "mlcbuild"}

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            known = ", ".join(self._engines)
            raise Refused(404, f"no model `{name}` here; there are: {known}", "model_not_found")
        return self._engines[name]

    async def _chat(self, request: Request) -> Response:
        return await self._write(request, parse(ChatRequest, await _body(request)))

    async def _complete(self, request: Request) -> Response:
        return await self._write(request, parse(CompletionRequest, await _body(request)))

    async def _write(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        engine = self._engine(asked.model)
        # Tokenizing a long prompt takes a while, in which others are to be answered, and 200 times its memory.
        async with self._tokenizing:
            answer = await run_in_threadpool(answers.answer, engine, asked.model, asked)
        answers.listen(answer)
        answer.begin()
        self._going.add(answer)
        if asked.stream:
            # At its end the server tells streams by `end`, so they need not be cut off before.
            return EventSourceResponse(self._events(answer), sep="\n", shutdown_grace_period=_PATIENCE)
        gone = asyncio.create_task(_disconnected(request))
        whole = asyncio.create_task(answer.whole())
        try:
            await asyncio.wait([gone, whole], return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await whole) if whole.done() else Response(status_code=499)
        except MlcBuildError as error:  # not the request's fault
            raise (error if isinstance(error, Refused) else Refused(500, str(error))) from None
        finally:
            self._finish(answer)
            gone.cancel()
            whole.cancel()

    async def _events(self, answer: answers.Answer) -> AsyncIterator[dict[str, str]]:
        """Server-sent events, up to `[DONE]`; where the client goes, the generator is closed, and the texts with it."""
        try:
            async for chunk in answer.stream():
                yield {"data": json.dumps(chunk)}
            yield {"data": "[DONE]"}
        except MlcBuildError as error:
            status = error.status if isinstance(error, Refused) else 500
            yield {"data": json.dumps(_described_error(status, str(error), None))}
        finally:
            self._finish(answer)

    def _finish(self, answer: answers.Answer) -> None:
        self._going.discard(answer)
        answer.cancel()

    def end(self) -> None:
        """Answers that are not complete end with an error: the server ends."""
        for answer in list(self._going):
            answer.fail(Refused(503, "the server ends before the answer is complete"))

    async def _embed(self, request: Request) -> Response:
        asked = parse(EmbeddingRequest, await _body(request))
        engine, loop = self._engine(asked.model), asyncio.get_running_loop()
        texts: list[str] = several(asked.input)
        if engine.writes:
            raise MlcBuildError(f"{asked.model} writes texts, it gives no vectors")
        done: asyncio.Future[Any] = loop.create_future()

        def compute() -> None:
            """In the engine's thread: a model computes in one thread at a time."""
            try:
                ids = [engine.model.text_ids(text) for text in texts]
                found = (engine.model.embed(texts), sum(map(len, ids)))
                loop.call_soon_threadsafe(_settle, done, found, None)
            except MlcBuildError as error:
                loop.call_soon_threadsafe(_settle, done, None, error)
            except Exception:
                failed = Refused(500, "the vectors could not be computed: the server's output says why")
                loop.call_soon_threadsafe(_settle, done, None, failed)
                raise

        engine.call(compute)
        vectors, count = await done
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(vector, asked.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


async def _missed(request: Request, error: Exception) -> Response:
    """What starlette answers itself: no such path, or not with that method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    said = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
    response = _error(error.status_code, said.get(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _failed(_: Request, error: Exception) -> Response:
    return _error(500, "the request could not be answered: the server's output says why")


async def _body(request: Request) -> bytes:
    """A JSON request's bytes. Raises Refused for another kind, and for one that is too long."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send JSON, with `Content-Type: application/json`")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the request is longer than {MOST_BYTES // 2**20} MiB")
    return bytes(body)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _settle(future: asyncio.Future[Any], value: Any, error: MlcBuildError | None) -> None:
    if future.done():  # its request was cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _vector(vector: Any, encoding: str) -> Any:
    raw = np.asarray(vector, "<f4")
    return base64.b64encode(raw.tobytes()).decode() if encoding == "base64" else raw.tolist()


def _error(status: int, message: str, code: str | None = None) -> JSONResponse:
    return JSONResponse(_described_error(status, message, code), status)


def _described_error(status: int, message: str, code: str | None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
