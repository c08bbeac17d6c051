"""Run a checkpoint's server: the generator in this thread, HTTP in another, an orderly end."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nemo_bluelm.config.compose import load_recipe
from nemo_bluelm.errors import UserError
from nemo_bluelm.generate.generator import open_generator
from nemo_bluelm.runtime.run_dir import RECIPE_FILE
from nemo_bluelm.serve.app import Api
from nemo_bluelm.serve.engine import Engine
from nemo_bluelm.serve.settings import Served, Settings, context_of

_BACKLOG = 2048  # connections that wait to be accepted
_UNREAD = 64 << 10  # bytes of a connection in the kernel
_LAST_BYTES = 2  # seconds for answers to leave after the last one is written


def serve(checkpoint: Path, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, which let what was accepted end; a second one doesn't. Needs the main thread.

    Args:
        checkpoint: as :func:`nemo_bluelm.runtime.run_dir.resolve_checkpoint` gives it.

    Raises:
        UserError: the address can't be had; the checkpoint can't be read.
    """
    recipe = load_recipe(str(checkpoint / RECIPE_FILE), [])
    with _bound(settings) as listener, open_generator(checkpoint) as generator:
        served = Served(
            settings.model_name or recipe.name,
            context_of(recipe),
            generator.tokenizer,
            generator.geometry,
            generator.control_token,
        )
        engine = Engine(settings.max_batch, settings.max_batch_tokens)
        server = _Server(Api(engine, served, settings), engine, settings)
        with _address_errors(settings):
            listener.listen(_BACKLOG)
        thread = threading.Thread(target=server.run_until_end, args=[listener], name="http")
        thread.start()
        with _signals(server):
            try:
                engine.run(generator)
            finally:
                server.stop()
                thread.join()
        if server.error is not None:
            raise server.error


class _Server(uvicorn.Server):
    """Uvicorn's server, whose end waits for the engine."""

    def __init__(self, api: Api, engine: Engine, settings: Settings):
        config = uvicorn.Config(
            api.app,
            http=partial(_Protocol, settings.stall_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_LAST_BYTES,
        )
        super().__init__(config)
        self._api, self._engine, self._settings = api, engine, settings
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None

    def run_until_end(self, listener: socket.socket) -> None:
        """In a thread of its own; the engine ends with it, whatever ended it."""
        try:
            self.run([listener])
        except BaseException as error:
            self.error = error
        finally:
            self._engine.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        host, port = sockets[0].getsockname()[:2]
        if self._settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
            print(f"Note: whoever reaches {host} may ask; --api-key-env NAME asks for a key", file=sys.stderr)
        host = f"[{host}]" if ":" in host else host
        print(f"Serving {self._api.model_name} on http://{host}:{port}/v1; Ctrl-C ends it", flush=True)

    def stop(self) -> None:
        """Refuse new requests, let the accepted ones end; called again, end at once. From any thread."""
        if self._loop is None:
            self.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._draining is not None:
            self._engine.close()
            return
        self._api.draining = True
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        end = self._loop.time() + self._settings.grace_seconds
        while self._api.requests and not self._engine.closed and self._loop.time() < end:
            await asyncio.sleep(0.05)
        self._engine.close()
        self.should_exit = True


class _Protocol(H11Protocol):
    """Cuts off a client that doesn't get a request's head done within ``seconds``, for which uvicorn waits forever."""

    def __init__(self, seconds: float, **options):
        super().__init__(**options)
        self._seconds = seconds
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._end = self.loop.call_later(self._seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head was complete
            self._stop_clock()
        elif self._end is None:  # of a further request
            self._end = self.loop.call_later(self._seconds, self.transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(error)

    def _stop_clock(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


@contextlib.contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """A socket at the address, not yet listening: a server that will not start should say so before it loads weights.

    Raises:
        UserError: the address can't be had.
    """
    with _address_errors(settings):
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    with listener:
        with _address_errors(settings):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted connections inherit both: the kernel holds so much for a client that doesn't read, and closes the
            # connection once it has read nothing for so long, which ends its request too.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.stall_seconds * 1000))
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def _address_errors(settings: Settings) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        raise UserError(f"can't listen on {where}: {error.strerror}; choose another --port or --host") from error


@contextlib.contextmanager
def _signals(server: _Server) -> Iterator[None]:
    handlers = {number: signal.signal(number, lambda *_: server.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
