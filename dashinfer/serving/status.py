"""The routes that tell about the server: is it alive, is it ready, what does it serve.

`/health` and `/health/ready` are for those who send requests, `/health/live` for those who start the server again: while
workers start again after a failure it is alive, and not ready.
"""

from typing import Any

from quart import Response, request
from quart_trio import QuartTrio

from dashinfer.protocol.status import version_body
from dashinfer.protocol.stream import health_body, model_body, model_list_body
from dashinfer.serving.service import Service

OPEN_PATHS = ("/health", "/health/live", "/health/ready", "/ping", "/version")

_JSON = {"content-type": "application/json"}


def add_routes(app: QuartTrio, service: Service) -> None:
    """Add them to an application."""

    def health(well: bool) -> Response:
        state = service.state
        status = "ok" if state == "ready" else state
        return Response(health_body(status, service.mode), 200 if well else 503, headers=_JSON)

    @app.get("/health")
    @app.get("/health/ready")
    @app.route("/ping", methods=["GET", "POST"])
    async def ready() -> Response:
        return health(service.state == "ready")

    @app.get("/health/live")
    async def live() -> Response:
        return health(service.state != "failed")

    @app.get("/version")
    async def version() -> Response:
        return Response(version_body(service.version), headers=_JSON)

    @app.get("/metrics")
    async def metrics() -> Response:
        body, content_type = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @app.get("/v1/models")
    async def models() -> Response:
        return Response(model_list_body(**describe()), headers=_JSON)

    @app.get("/v1/models/<path:model>")
    async def one_model(model: str) -> Response:
        described = describe()
        service.check_model(model)
        return Response(model_body(**described), headers=_JSON)

    def describe() -> dict[str, Any]:
        engine, _ = service.require()
        assert engine.info is not None, "an engine that is ready knows its model"
        return {"model": service.config.model_name, "created": service.created, "max_length": engine.info.max_length}
