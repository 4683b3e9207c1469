"""The ASGI target: `hypercorn --worker-class trio dashinfer.serving.asgi:app`, with settings from `DASHINFER_*` variables.

The engine lives in the application's lifespan. Start-up returns at once, because servers limit it to a minute and a model may
take longer; until it is loaded, `/health` answers 503 `loading`. A server ignores a lifespan that crashes and would go on
answering, so a failed engine ends the process by SIGTERM, for a supervisor to start it again.
"""

import logging
import os
import signal
import sys
from functools import partial

import trio

from dashinfer.errors import ConfigurationError, EngineUnavailable, WorkerError
from dashinfer.serving import log
from dashinfer.serving.app import create_app
from dashinfer.serving.backend import Backend, ModelBackend, RunnableEngine
from dashinfer.serving.cli import version
from dashinfer.serving.edge import ASGIApp, Receive, Scope, Send
from dashinfer.serving.environment import from_environment
from dashinfer.serving.progress import LogDisplay, report_progress
from dashinfer.serving.run import LAST_WORDS
from dashinfer.serving.service import Service, TextModel

logger = logging.getLogger(__name__)


class Application:
    """An ASGI application that reads its settings and starts its engine when its lifespan begins."""

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend = backend or ModelBackend()
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is None:
            raise EngineUnavailable("this server does not run the ASGI lifespan, in which the engine lives")
        else:
            await self._app(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        message = await receive()
        assert message["type"] == "lifespan.startup", "the first event of a lifespan"
        if "hypercorn.trio.run" in sys.modules:  # as a rule
            from dashinfer.serving import connections

            connections.contain()
        try:
            settings = from_environment(os.environ)
            if settings.nnodes > 1:
                raise ConfigurationError("DASHINFER_NNODES: several machines are served by the command dashinfer_serve alone")
            service = Service(settings, version=version())
            service.open_tracing()
            self._app = create_app(service)
        except ConfigurationError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        log.configure(settings.log_level, settings.log_format, libraries=False)
        try:
            async with trio.open_nursery() as nursery:
                if settings.api_keys_file is not None:
                    await nursery.start(self._reload_keys, service)
                await nursery.start(service.background.run)
                nursery.start_soon(self._keep_engine, service)
                await send({"type": "lifespan.startup.complete"})
                message = await receive()
                assert message["type"] == "lifespan.shutdown", "the second event of a lifespan"
                service.begin_drain()
                # The server has waited for its own requests by now, as long as its settings say: this is for the background.
                with trio.move_on_after(settings.drain_timeout):
                    await service.idle()
                nursery.cancel_scope.cancel()
        finally:
            await service.close_tracing()
        await send({"type": "lifespan.shutdown.complete"})

    async def _reload_keys(self, service: Service, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                service.reload_keys()

    async def _keep_engine(self, service: Service) -> None:
        try:
            await self._run_engine(service)
        except Exception as error:
            reason = log.describe(error)
            service.fail(reason)
            logger.error("%s; ending the process", reason, exc_info=error if service.config.log_level == "debug" else None)
            with trio.move_on_after(LAST_WORDS):
                await service.idle()
            os.kill(os.getpid(), signal.SIGTERM)

    async def _run_engine(self, service: Service) -> None:
        display = LogDisplay()
        source = await trio.to_thread.run_sync(self._backend.resolve, service.config, display.report, abandon_on_cancel=True)
        engine: RunnableEngine = self._backend.engine(service.config, source, partial(report_progress, display))

        async def serve_when_ready() -> None:
            text: TextModel = await trio.to_thread.run_sync(self._backend.text, service.config, source, abandon_on_cancel=True)
            await loaded.wait()
            service.ready(engine, text)
            log.notices.info("ready: %s", service.config.model_name)

        loaded = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_when_ready)
            await nursery.start(engine.run)
            loaded.set()
        raise WorkerError("the engine ended by itself")


app = Application()
