"""A server on a loopback socket, in the test's own event loop: real Hypercorn and routes, fake engine."""

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.serving import listen
from dashinfer.serving.app import create_app
from dashinfer.serving.connections import serve
from dashinfer.serving.service import Service, TextModel

from .fake_engine import FakeEngine, make_text

if TYPE_CHECKING:
    from dashinfer.serving.tracing import Tracing


@dataclass
class Running:
    url: str
    engine: FakeEngine
    service: Service
    client: httpx.AsyncClient

    async def chat(self, content: str, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=self.body(content, **fields))

    @staticmethod
    def body(content: str, **fields: Any) -> dict[str, Any]:
        return {"model": "demo", "messages": [{"role": "user", "content": content}], **fields}

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)))


RunServer = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_text(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run_server(text: TextModel) -> RunServer:
    @asynccontextmanager
    async def run(
        *,
        ready: bool = True,
        engine_type: type[FakeEngine] = FakeEngine,
        model: TextModel = text,
        tracing: "Tracing | None" = None,
        **settings: Any,
    ) -> AsyncIterator[Running]:
        engine = engine_type()
        service = Service(ServerConfig(model="demo", host="127.0.0.1", port=0, **settings), version="0")
        service.tracing = tracing
        with listen.bind("127.0.0.1", 0) as sockets:
            certificate = service.config.ssl_certfile
            url = listen.url(sockets, tls=certificate is not None)
            config = listen.hypercorn_config(
                sockets,
                graceful_timeout=1,
                certificate=certificate,
                key=service.config.ssl_keyfile,
                root_path=service.config.root_path,
            )
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                await nursery.start(service.background.run)
                if ready:
                    service.ready(engine, model)
                await nursery.start(partial(serve, create_app(service), config, mode="asgi"))
                async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                    yield Running(url, engine, service, client)
                nursery.cancel_scope.cancel()

    return run
