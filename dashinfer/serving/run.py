"""The command's life: one root nursery that holds the engine, the HTTP server and the signals, and ends with one exit status.

Order of a start: the sockets, so that a taken port is told at once; the model and its workers; and while those load, the HTTP
stack, which answers `/health` with 503 until the model is there. Order of an end: stop accepting, let requests finish, cut what
did not, stop the workers. A crash of any part ends all of them. Nothing of it can hang: whenever the root nursery is cancelled,
a watchdog gives the rest a few seconds.
"""

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from dashinfer.config import ServerConfig
from dashinfer.errors import WorkerError
from dashinfer.serving import listen, log
from dashinfer.serving.backend import Backend, ModelBackend, RunnableEngine
from dashinfer.serving.cli import version
from dashinfer.serving.ending import run_to_end
from dashinfer.serving.progress import Display, make_display, report_progress
from dashinfer.serving.service import Service, TextModel
from dashinfer.types import ModelFiles, Ready

if TYPE_CHECKING:
    from hypercorn.config import Config
    from quart_trio import QuartTrio

    from dashinfer.cluster.hub import Hub

logger = logging.getLogger(__name__)

WATCHDOG = 5.0  # seconds from the cancellation of everything to the end of the process
FAREWELL = 2.0  # seconds for answers that say why, once the engine is cut off
LAST_WORDS = 0.5  # seconds for the same once the engine has failed: it has waited for the requests it had, not for newer ones
LAST_BYTES = 0.1  # seconds at a second signal, for requests whose clients have everything but whose tasks have yet to end
_HEAD_START = 0.3  # seconds that finding the model has the interpreter to itself before the HTTP stack is imported


def run(config: ServerConfig, backend: Backend | None = None) -> int:
    """Serve until a signal or a failure. A failure after the start is told in one line on standard error.

    Returns:
        The exit status: 0 after a drain, 1 after a failure, 128 + signal where a signal cut the start or the drain short.

    Raises:
        StartupError: the server could not start.
    """
    log.configure(config.log_level, config.log_format)
    server = Server(config, backend or ModelBackend())
    status = run_to_end(server.serve, config.log_level)
    return status or server.exit_code or 0


class Server:
    """The parts and how they end each other.

    Attributes:
        exit_code: the exit status once it is decided, None before.
    """

    exit_code: int | None = None

    def __init__(self, config: ServerConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._engine: RunnableEngine | None = None
        self._engine_scope = trio.CancelScope()
        self._root_scope = trio.CancelScope()
        self._asked_to_end = trio.Event()

    async def serve(self) -> None:
        """Everything, until it ends.

        Raises:
            StartupError, WorkerError: alone or in groups.
        """
        self._service = Service(self._config, version=version())
        self._resolved, self._listening, self._draining = trio.Event(), trio.Event(), trio.Event()
        watchdog = threading.Timer(WATCHDOG, self._end_hard)
        watchdog.daemon = True
        try:
            with self._bind() as sockets, self._bind_for_machines() as self._for_machines, make_display() as display:
                # Signals are taken to the very end, or one that comes while the workers stop would kill this process instead.
                async with trio.open_nursery() as outside:
                    await outside.start(self._watch_signals)
                    try:
                        with self._root_scope:
                            await self._run_parts(sockets, display, watchdog)
                    finally:
                        watchdog.cancel()  # what is left has a bound of its own
                        await self._service.close_tracing()
                    outside.cancel_scope.cancel()
        finally:
            watchdog.cancel()

    async def _run_parts(self, sockets: list[socket.socket], display: Display, watchdog: threading.Timer) -> None:
        async with trio.open_nursery() as self._root:
            self._root.start_soon(self._arm_when_cancelled, watchdog)
            self._root.start_soon(self._drain_when_asked)
            await self._root.start(self._service.background.run)
            url = listen.url(sockets, tls=self._config.ssl_certfile is not None)
            self._root.start_soon(self._load, display, url)
            self._root.start_soon(self._serve_http, sockets)

    def _bind(self) -> AbstractContextManager[list[socket.socket]]:
        config = self._config
        if config.ssl_certfile is not None and config.ssl_keyfile is not None:
            listen.check_certificate(config.ssl_certfile, config.ssl_keyfile)
        return listen.bind(config.host, config.port) if config.uds is None else listen.bind_unix(config.uds)

    async def _load(self, display: Display, url: str) -> None:
        logger.info("taking %s; loading %s", url, self._config.model)
        source = await trio.to_thread.run_sync(self._backend.resolve, self._config, display.report, abandon_on_cancel=True)
        arguments: dict[str, Any] = {}
        if self._for_machines is not None:
            arguments["hub"] = await self._root.start(self._run_hub, self._for_machines, source.files)
        self._engine = engine = self._backend.engine(self._config, source, partial(report_progress, display), **arguments)
        self._resolved.set()
        text: TextModel | None = None

        async def load_text() -> None:
            nonlocal text
            text = await trio.to_thread.run_sync(self._backend.text, self._config, source, abandon_on_cancel=True)

        async with trio.open_nursery() as loading:
            loading.start_soon(load_text)
            info: Ready = await self._root.start(self._run_engine, engine)
            await self._listening.wait()
        assert text is not None, "the nursery ended without it"
        display.__exit__(None, None, None)
        self._service.ready(engine, text)
        _announce(self._config, url, info)

    def _bind_for_machines(self) -> AbstractContextManager[socket.socket | None]:
        """The port for the other machines, if there are any."""
        if self._config.nnodes == 1:
            return nullcontext()
        from dashinfer.cluster import network

        return network.bind(self._config.master_addr, self._config.master_port, self._config.cluster_interface)

    async def _run_hub(self, listener: socket.socket, files: ModelFiles, *, task_status: trio.TaskStatus["Hub"]) -> None:
        from dashinfer.cluster.hub import Hub

        hub = Hub.from_config(self._config, listener, files)
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            task_status.started(hub)

    async def _run_engine(self, engine: RunnableEngine, *, task_status: trio.TaskStatus[Ready]) -> None:
        try:
            with self._engine_scope:
                await engine.run(task_status=task_status)
            if not self._engine_scope.cancelled_caught:
                raise WorkerError("the engine ended by itself")
        except Exception as error:
            self._service.fail(log.describe(error))
            with trio.move_on_after(LAST_WORDS):
                await self._service.idle()
            raise

    async def _serve_http(self, sockets: list[socket.socket]) -> None:
        with trio.move_on_after(_HEAD_START):
            await self._resolved.wait()
        app, settings = await trio.to_thread.run_sync(self._make_http, sockets)
        from dashinfer.serving.connections import serve

        await self._root.start(partial(serve, app, settings, shutdown_trigger=self._draining.wait, mode="asgi"))
        self._listening.set()

    def _make_http(self, sockets: list[socket.socket]) -> tuple["QuartTrio", "Config"]:
        import dashinfer.serving.connections  # noqa: F401 - half a second of imports, here because this is a thread
        from dashinfer.serving.app import create_app

        settings = listen.hypercorn_config(
            sockets,
            graceful_timeout=self._config.drain_timeout + 2 * FAREWELL,
            certificate=self._config.ssl_certfile,
            key=self._config.ssl_keyfile,
            root_path=self._config.root_path,
        )
        self._service.open_tracing()
        return create_app(self._service), settings

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        """It outlives the root nursery, which may be anything when a signal comes: yet to be opened, ending, or closed."""
        reloading = [signal.SIGHUP] if self._config.api_keys_file is not None else []
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *reloading) as signals:
            task_status.started()
            async for number in signals:
                if number in reloading:
                    self._service.reload_keys()
                    continue
                if self.exit_code is not None:
                    continue  # it is ending, and the watchdog sees to it
                if self._service.state == "loading":
                    self._end(128 + number)
                elif not self._asked_to_end.is_set():
                    self._asked_to_end.set()
                else:
                    with trio.move_on_after(LAST_BYTES):
                        await self._service.idle()
                    self._end(128 + number if self._service.in_flight else 0)

    async def _drain_when_asked(self) -> None:
        await self._asked_to_end.wait()
        assert self._engine is not None, "only what serves is drained"
        config, service = self._config, self._service
        logger.info(
            "shutting down: %d requests may finish within %g s; a second signal ends at once",
            service.in_flight,
            config.drain_timeout,
        )
        service.begin_drain()
        self._engine.begin_drain()
        self._draining.set()  # Hypercorn closes the port
        with trio.move_on_after(config.drain_timeout) as patience:
            await self._engine.drained()
            await service.idle()
        if patience.cancelled_caught:
            logger.warning("%d requests did not finish within %g s and are cut off", service.in_flight, config.drain_timeout)
        self._engine_scope.cancel()
        with trio.move_on_after(FAREWELL):
            await service.idle()
        self._end(0)

    def _end(self, exit_code: int) -> None:
        self.exit_code = exit_code
        self._root_scope.cancel()

    async def _arm_when_cancelled(self, watchdog: threading.Timer) -> None:
        try:
            await trio.sleep_forever()
        finally:
            watchdog.start()

    def _end_hard(self) -> None:
        reason = f" after: {self._service.failure}" if self._service.failure else ""
        print(
            f"dashinfer_serve: error: could not stop within {WATCHDOG:g} s{reason}; ending the process",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1 if self.exit_code is None else self.exit_code)


def _announce(config: ServerConfig, url: str, info: Ready) -> None:
    """Tells that the server is ready, and with what."""
    workers = config.data_parallel * config.tensor_parallel * config.pipeline_parallel
    of_each = f" in each of {workers} workers" if workers > 1 else ""
    base = url + config.root_path if config.uds is None else config.root_path
    rows = {
        "address": url if config.host in url or config.uds is not None else f"{url} (bound to {config.host})",
        "model": f"{config.model_name} ({info.architecture}, mode {info.mode})"
        + (f" in {config.data_parallel} copies" if config.data_parallel > 1 else ""),
        "device": f"{info.device}, {info.data_type}",
        "memory": f"{info.weight_bytes / 2**20:,.0f} MiB of weights, {info.activation_bytes / 2**20:,.0f} MiB for activations"
        + (f", {info.graph_bytes / 2**20:,.0f} MiB of CUDA graphs" if info.graph_bytes else "")
        + of_each,
        "KV cache": f"{info.num_blocks * info.block_size:,} tokens"
        + ("" if info.kv_cache_dtype == "auto" else f" in {info.kv_cache_dtype}")
        + f", {info.kv_cache_bytes / 2**20:,.0f} MiB{of_each}; "
        f"a sequence up to {info.max_length:,} tokens",
        **(
            {"vision": f"{info.vision_engine}, {info.media_cache_bytes / 2**20:,.0f} MiB for embeddings of images"}
            if info.mode == "vlm"
            else {}
        ),
        "API": f"{base}/v1{', with a key' if config.api_keys or config.api_keys_file else ''}",
        "docs": f"{base}/docs",
    }
    log.notices.info("ready")
    for name, value in rows.items():
        log.notices.info("  %-9s %s", name, value)
