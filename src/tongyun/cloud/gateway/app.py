"""The routes of the gateway, and the shape of every error that leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from tongyun import __version__
from tongyun.cloud.gateway.ask import Served, ask_chat, ask_completion, find
from tongyun.cloud.gateway.bridge import Bridge
from tongyun.cloud.gateway.classes import HEADER, Classes
from tongyun.cloud.gateway.exchange import Ask, Exchange
from tongyun.cloud.gateway.faults import Refused, fault_object, status_of
from tongyun.cloud.gateway.guard import ARRIVED, Guard
from tongyun.cloud.gateway.meters import Meters
from tongyun.cloud.gateway.ports import StartEngine
from tongyun.cloud.gateway.reply import Reply
from tongyun.cloud.gateway.wire import Body, ChatBody, CompletionBody, read_chat, read_completion
from tongyun.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """All that decides how the endpoint behaves."""

    served: Served
    start_engine: StartEngine
    api_key: str | None = None
    body_bytes: int = 16 * 2**20
    headers: Mapping[str, str] = field(default_factory=dict)
    """Said with every answer."""
    classes: Classes = field(default_factory=Classes)
    others: tuple[Served, ...] = ()
    """Models behind the endpoint besides `served`, where the engine tells them apart."""

    @property
    def models(self) -> tuple[Served, ...]:
        return self.served, *self.others


def build_app(gateway: Gateway) -> FastAPI:
    """The ASGI application; the engine starts and stops with it."""
    meters = Meters()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.bridge = bridge = Bridge(gateway.start_engine)
        meters.watch(bridge.stats)
        yield
        await asyncio.to_thread(bridge.stop)

    app = FastAPI(title="Tongyun", version=__version__, lifespan=lifespan)
    app.add_middleware(Guard, api_key=gateway.api_key, body_bytes=gateway.body_bytes, headers=gateway.headers)
    _add_faults(app, meters)
    _add_generation(app, gateway, meters)
    _add_models(app, gateway.models)
    _add_state(app, meters)
    _add_schemas(app)
    return app


def _add_generation(app: FastAPI, gateway: Gateway, meters: Meters) -> None:
    models, classes = gateway.models, gateway.classes

    def reply(ask: Ask, served: Served, body: Body, request: Request) -> Reply:
        name, priority = classes.of(request.headers.get(HEADER), body.service_tier)
        if name is not None:
            ask = replace(ask, priority=priority, priority_class=name)
        exchange = Exchange(ask, served.vocabulary, request.scope[ARRIVED])
        return Reply(exchange, app.state.bridge, meters)

    # The body is read by hand: pydantic parses the bytes in one pass, whatever content type came with them.
    @app.post("/v1/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        body = read_completion(await request.body())
        served = find(body.model, models)
        return reply(await ask_completion(body, served), served, body, request)

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        body = read_chat(await request.body())
        served = find(body.model, models)
        return reply(await ask_chat(body, served), served, body, request)


def _documented(body: type[CompletionBody] | type[ChatBody]) -> dict[str, object]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_schemas(app: FastAPI) -> None:
    """Put the bodies that are read by hand into /openapi.json."""
    plain = app.openapi

    def with_bodies() -> dict[str, Any]:
        whole = plain()
        _, bodies = models_json_schema(
            [(CompletionBody, "validation"), (ChatBody, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        whole.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
        return whole

    app.openapi = with_bodies  # type: ignore[method-assign]


def _add_models(app: FastAPI, models: Sequence[Served]) -> None:
    def card(name: str, served: Served) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "tongyun",
            # Beyond OpenAI's fields: what a load generator needs to build prompts by itself.
            "max_model_len": served.context_tokens,
            "vocab_size": served.vocab,
        }

    @app.get("/v1/models")
    async def every() -> dict[str, object]:
        return {"object": "list", "data": [card(name, one) for one in models for name in one.names]}

    # Hub ids hold a slash.
    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        return card(name, find(name, models))


def _add_state(app: FastAPI, meters: Meters) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while an engine lives, or another is to be started in its place."""
        failure = app.state.bridge.failure
        if failure is not None:
            raise Refused(503, f"the engine stopped: {failure}", code="engine_unavailable")
        up = [one.up for one in app.state.bridge.stats().replicas]
        if not up:
            return JSONResponse({"status": "ok"})
        status = "ok" if all(up) else "degraded"
        return JSONResponse({"status": status, "replicas": len(up), "ready_replicas": sum(up)})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken."""
        if app.state.bridge.draining:
            raise Refused(503, "the server is shutting down", code="server_draining")
        answer = await health()
        replicas = app.state.bridge.stats().replicas
        if replicas and not any(one.up for one in replicas):
            raise Refused(503, "no replica is up; each is to be started again", code="engine_unavailable")
        return answer

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(meters.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_faults(app: FastAPI, meters: Meters) -> None:
    def tell(fault: RequestError) -> JSONResponse:
        return JSONResponse(fault_object(fault), status_code=status_of(fault))

    @app.exception_handler(RequestError)
    async def refused(request: Request, fault: RequestError) -> JSONResponse:
        if status_of(fault) < 500 and request.url.path.startswith("/v1"):
            meters.refused(request.url.path)
        return tell(fault)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> JSONResponse:
        """No such route, or not with this method."""
        if error.status_code == 404:
            problem = Refused(404, f"no such route: {request.method} {request.url.path}", code="unknown_url")
        else:
            problem = Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
        answer = tell(problem)
        answer.headers.update(error.headers or {})
        return answer

    # Registered for `Exception`, this answers and lets the error through to the server's log.
    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return tell(Refused(500, "the server made a mistake; its log says which", code="internal_error"))
