"""The HTTP side: who may ask, how much, and what they get. It only passes on what the engine writes."""

import asyncio
import contextlib
import hmac
from collections.abc import Iterator
from functools import partial

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nemo_bluelm.generate.request import Reply
from nemo_bluelm.serve.engine import Engine, Job
from nemo_bluelm.serve.errors import ApiError, shutting_down
from nemo_bluelm.serve.replies import Chunks, completion
from nemo_bluelm.serve.schema import Asked, read_chat
from nemo_bluelm.serve.settings import Served, Settings

_READERS = 2  # requests that are checked, their images decoded, at a time


class Api:
    """The application of one model.

    Attributes:
        app: to be run by an ASGI server.
        model_name: what clients call it.
        draining: what comes now is refused.
        requests: that were accepted and are not yet answered.
    """

    def __init__(self, engine: Engine, served: Served, settings: Settings):
        self._engine, self._served, self._settings = engine, served, settings
        self._readers: anyio.CapacityLimiter | None = None  # belongs to the loop, which is not there yet
        self.draining, self.requests = False, 0
        routes = [
            Route("/v1/chat/completions", _Endpoint(self._chat), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
        ]
        self.model_name = served.name
        handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, request: Request) -> Response:
        if self.draining or self._engine.closed:
            raise shutting_down()
        return JSONResponse({"status": "ok", "requests": self.requests})

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self._served.name, "object": "model", "owned_by": "nemo_bluelm"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self._served.context}]})

    async def _chat(self, request: Request, send: Send) -> None:
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also what keeps web pages out, which may send other types anywhere without asking.
            raise ApiError(415, "the request's Content-Type must be application/json", "unsupported_media_type")
        with self._place():
            deadline = asyncio.get_running_loop().time() + self._settings.request_seconds
            try:
                with anyio.fail_after(self._settings.request_seconds):
                    asked = await self._read(request)
            except TimeoutError:
                raise _too_slow(self._settings) from None
            except ClientDisconnect:
                return
            job = Job(asked)
            self._engine.submit(job)
            watcher = asyncio.create_task(_end_when_gone(request.receive, job))
            try:
                await (self._stream if asked.stream else self._whole)(job, deadline, request, send)
            finally:
                watcher.cancel()
                self._engine.cancel(job)

    def _check_key(self, request: Request) -> None:
        key = self._settings.api_key
        given = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "the key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key", headers
            )

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the requests that the server has at once; taken before the body is read."""
        if self.draining:
            raise shutting_down()
        if self.requests >= self._settings.max_requests:
            message = f"{self.requests} requests are waiting or running; try again later"
            raise ApiError(429, message, "queue_full", {"Retry-After": "2"})
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    async def _read(self, request: Request) -> Asked:
        limit, stall = self._settings.max_body, self._settings.stall_seconds
        too_large = ApiError(413, f"the body has more than {limit:,} bytes; send less", "body_too_large")
        if int(request.headers.get("content-length", 0)) > limit:  # a server of HTTP lets digits through only
            raise too_large
        body = bytearray()
        chunks = request.stream()
        while True:
            try:
                body += await asyncio.wait_for(anext(chunks), stall)
            except StopAsyncIteration:
                break
            except asyncio.TimeoutError:
                raise ApiError(408, f"nothing of the body came for {stall:g} s", "body_stalled") from None
            if len(body) > limit:
                raise too_large
        if self._readers is None:
            self._readers = anyio.CapacityLimiter(_READERS)
        read = partial(read_chat, body, self._served, self._settings)
        return await anyio.to_thread.run_sync(read, limiter=self._readers)

    async def _whole(self, job: Job, deadline: float, request: Request, send: Send) -> None:
        replies: dict[int, Reply] = {}
        try:
            with anyio.fail_after(deadline - asyncio.get_running_loop().time()):
                async for pieces in job.pieces():
                    replies |= {piece.index: piece.reply for piece in pieces}
        except TimeoutError:
            raise _too_slow(self._settings) from None
        if len(replies) < job.asked.sampling.samples:
            return  # the client has gone
        ordered = [replies[index] for index in sorted(replies)]
        content = completion(job.asked, ordered, self._served.name, self._served.tokenizer)
        await JSONResponse(content)(request.scope, request.receive, send)

    async def _stream(self, job: Job, deadline: float, request: Request, send: Send) -> None:
        """Server-sent events. The status waits for the first piece, so that it can still be an error's."""
        chunks = Chunks(job.asked, self._served.name, self._served.tokenizer)
        begun = False
        try:
            with anyio.fail_after(deadline - asyncio.get_running_loop().time()):
                async for pieces in job.pieces():
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
                        await _send_part(send, chunks.begin())
                    await _send_part(send, chunks.pieces(pieces))
            if not chunks.complete:
                return  # the client has gone
            last = chunks.end()
        except (TimeoutError, ApiError) as error:
            error = error if isinstance(error, ApiError) else _too_slow(self._settings)
            if not begun:
                raise error from None
            last = chunks.error(error.body)
        await _send_part(send, last, more=False)


_EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def _send_part(send: Send, body: bytes, more: bool = True) -> None:
    """Waits while the client doesn't read."""
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _end_when_gone(receive: Receive, job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not job.over:
        job.end()


def _too_slow(settings: Settings) -> ApiError:
    message = f"no reply within {settings.request_seconds:g} s; ask for fewer tokens, or try again later"
    return ApiError(504, message, "timeout")


class _Endpoint:
    """A method as an application of its own: Starlette takes methods for functions that return a response."""

    def __init__(self, method):
        self._method = method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._method(Request(scope, receive), send)


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} takes no {request.method}"}
    message = what.get(error.status_code, error.detail)
    return await _api_error(request, ApiError(error.status_code, message, None, error.headers))


async def _bug(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "a mistake of the server; its log tells more"))
