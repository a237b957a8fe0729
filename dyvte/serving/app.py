"""The server: OpenAI's chat completions over HTTP, with a schedule of visual tokens for every request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dyvte import __version__
from dyvte.errors import DyvteError
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import Collected
from dyvte.serving.bodies import BodyReader
from dyvte.serving.config import MEGABYTE, ServeConfig
from dyvte.serving.errors import RequestError
from dyvte.serving.events import all_at_once, one_by_one, unless_gone
from dyvte.serving.explore import trace_schedules
from dyvte.serving.hosts import HostGuard
from dyvte.serving.images import ImageReader
from dyvte.serving.jobs import Conversation, Ended, Event, Finished, Job
from dyvte.serving.metrics import Metrics
from dyvte.serving.replies import Replies, error_reply, exit_header, sse, to_json
from dyvte.serving.requests import ChatRequest, parse_chat, parse_json
from dyvte.serving.scheduler import Scheduler

PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PREPARED_AT_ONCE = 4
_log = logging.getLogger("dyvte.serving")


class Service:
    """One server's parts, and what its routes do.

    Parameters
    ----------
    answerer
        The model.
    config
        Limits, and the served name.
    """

    def __init__(self, answerer: Answerer, config: ServeConfig) -> None:
        self.answerer, self.config = answerer, config
        self.name = config.served_name or config.model.path
        self.created = int(time.time())
        self.scheduler = Scheduler(answerer, config.max_rows, config.max_waiting, on_group=self._count_rows)
        self.metrics = Metrics(
            answerer.shape.num_layers,
            waiting=lambda: self.scheduler.waiting_rows,
            running=lambda: self.scheduler.running_rows,
            image_bytes=lambda: self.scheduler.image_bytes,
        )
        self.images = ImageReader.of(config)
        self.bodies = BodyReader(int(config.max_body_mb * MEGABYTE))
        self._limiter: anyio.CapacityLimiter | None = None

    def _count_rows(self, rows: int) -> None:
        self.metrics.batch_rows.observe(rows)

    # -- routes ----------------------------------------------------------------------------------------
    async def complete(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked, conversation = await self._prepared(request)
        # What is streamed comes event by event; else there is one thing to wait for, the last of them.
        events: asyncio.Queue[Event] = asyncio.Queue()
        whole: asyncio.Queue[list[Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = self.answerer.job(
            conversation,
            id=f"chatcmpl-{uuid.uuid4().hex}",
            emit=one_by_one(events, loop) if asked.stream else all_at_once(whole, loop),
            schedule=self.answerer.menu.choose(asked.wish),
            decoding=asked.decoding,
            num_choices=asked.num_choices,
            streams=asked.stream,
            shares_images=asked.shares_images,
        )
        collected = Collected(asked.num_choices)
        tokenizer = self.answerer.pipeline.processor.tokenizer
        with_logprobs = asked.decoding.top_logprobs is not None
        replies = Replies(job.id, self.name, tokenizer, with_logprobs)
        self.scheduler.submit(job)
        try:
            came = await unless_gone(request, (events if asked.stream else whole).get())
            if came is not None and asked.stream:
                collected.add(came)
                stream = self._stream(asked, job, events, collected, replies, came)
                headers = {**_NO_STORE, **exit_header(came.report)}
                return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
            for event in came or ():
                collected.add(event)
        except BaseException:
            self.scheduler.cancel(job)
            raise
        if came is None:
            self.scheduler.cancel(job)
            self.metrics.cancelled.inc()
            return Response(status_code=499)
        answer = collected.answer()
        self.metrics.answered(answer)
        return _json(replies.whole(answer), headers=exit_header(answer.report))

    async def _stream(
        self,
        asked: ChatRequest,
        job: Job,
        events: asyncio.Queue[Event],
        collected: Collected,
        replies: Replies,
        first: Event,
    ) -> AsyncIterator[bytes]:
        """The events of a job whose prompt has been read; the client may go away at any of them."""
        is_over = False
        try:
            for chunk in replies.opening(first, asked.num_choices, collected.first_token):
                yield sse(chunk)
            new_tokens = 0
            while not isinstance(event := await events.get(), Finished):
                collected.add(event)
                new_tokens += event.num_tokens if isinstance(event, Ended) else 0
                if (chunk := replies.piece(event)) is not None:
                    yield sse(chunk)
            is_over = True
            self.metrics.answered(collected.answer())
            if asked.include_usage:
                yield sse(replies.closing(first.prompt_tokens, new_tokens))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            is_over = True
            yield sse(self._refusal(error)[1])
        finally:
            if not is_over:
                self.scheduler.cancel(job)
                self.metrics.cancelled.inc()

    async def explore(self, request: Request) -> Response:
        """``POST /v1/visual_exit/schedules``: what any schedule would answer."""
        asked, conversation = await self._prepared(request)
        if asked.stream or asked.num_choices > 1 or asked.decoding.temperature:
            raise RequestError(
                "answers of all schedules are greedy, one each: omit stream, n and temperature"
            )
        work = partial(trace_schedules, self.answerer, conversation, asked.decoding.max_tokens)
        future = self.scheduler.do(work)
        found = await unless_gone(request, asyncio.wrap_future(future))
        if found is None:
            self.metrics.cancelled.inc()
            return Response(status_code=499)
        return _json(asdict(found))

    async def models(self) -> Response:
        """``GET /v1/models``."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """``GET /v1/models/NAME``."""
        self._check_model(name)
        return _json(self._model())

    async def settings(self) -> Response:
        """``GET /v1/visual_exit``: what schedules there are."""
        menu, config = self.answerer.menu, self.config
        gates = None
        if menu.gates is not None:
            stored = menu.gates
            gates = {
                "threshold": stored.threshold,
                "min_layer": stored.min_layer,
                "fallback": stored.fallback,
                "freezes": stored.may_freeze,
                "certificates": [asdict(one) for one in menu.proofs.certificates],
                "groups": menu.groups,
            }
        return _json(
            {
                "model": self.name,
                "version": __version__,
                "policy": menu.own.text,
                "num_layers": self.answerer.shape.num_layers,
                "reduction": config.reduction,
                "gates": gates,
                "max_image_mb": config.max_image_mb,
                "max_megapixels": config.max_megapixels,
            }
        )

    async def health(self) -> Response:
        """``GET /health``: 200 while requests are served."""
        is_well = self.scheduler.is_running
        return _json({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    async def counts(self) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """``GET /``."""
        return await self.file("index.html")

    async def file(self, name: str) -> Response:
        """``GET /page/NAME``: the page's parts."""
        known = {path.name: path for path in PAGE.iterdir() if path.suffix in _TYPES}
        if name not in known:
            raise HTTPException(404)
        content = await anyio.to_thread.run_sync(known[name].read_bytes)
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=_TYPES[known[name].suffix], headers={**headers, **_NO_STORE})

    # -- parts -----------------------------------------------------------------------------------------
    async def _prepared(self, request: Request) -> tuple[ChatRequest, Conversation]:
        """A request's body, parsed, with its images; outside the event loop, a few at a time."""
        self.scheduler.check_open()
        body = await self.bodies.read(request)
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(_PREPARED_AT_ONCE)
        return await anyio.to_thread.run_sync(self._parse, body, limiter=self._limiter)

    def _parse(self, body: bytes) -> tuple[ChatRequest, Conversation]:
        config = self.config
        max_choices = min(config.max_choices, config.max_rows)  # more could never start
        asked = parse_chat(parse_json(body), max_choices=max_choices, max_images=config.max_images)
        if asked.model is not None:
            self._check_model(asked.model)
        self.answerer.menu.choose(asked.wish)  # before images are read: what is refused costs little
        images = [[self.images.read(url, path) for url, path in one.images] for one in asked.exchanges]
        history = [(one.text, one.answer) for one in asked.exchanges[:-1]]
        return asked, Conversation(asked.exchanges[-1].text, images, history, asked.system)

    def _check_model(self, name: str) -> None:
        if name != self.name:
            shown = name if len(name) <= 100 else f"{name[:100]}..."
            raise RequestError(
                f"model {shown!r}: this server has {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dyvte",
            "max_model_len": self.answerer.context,
        }

    def _refusal(self, error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
        status, body, headers = error_reply(error)
        if status == 500:
            _log.error("a request failed", exc_info=error)
        return status, body, headers

    async def refuse(self, request: Request, error: Exception) -> Response:
        """The reply to a request that raised."""
        status, body, headers = self._refusal(error)
        return _json(body, status, headers)


# Scripts and styles from this server alone; a saved page has none of this and brings its own.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; frame-ancestors 'none'"
_NO_STORE = {"Cache-Control": "no-store"}


def create_app(answerer: Answerer, config: ServeConfig) -> FastAPI:
    """The server's application; its thread begins and stops with it.

    Parameters
    ----------
    answerer
        The model.
    config
        The server's settings.
    """
    service = Service(answerer, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.scheduler.stop, config.stop_seconds)

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(
        title="dyvte",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for method, path, route in (
        ("POST", "/v1/chat/completions", service.complete),
        ("POST", "/v1/visual_exit/schedules", service.explore),
        ("GET", "/v1/visual_exit", service.settings),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.counts),
        ("GET", "/", service.page),
        ("GET", "/page/{name}", service.file),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)

    async def no_route(_: Request, error: HTTPException) -> Response:
        known = {404: "there is nothing here", 405: "this method is not served here"}
        text = known.get(error.status_code, str(error.detail))
        refusal = RequestError(text, status=error.status_code, code="not_found")
        return _json(error_reply(refusal)[1], error.status_code)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(DyvteError, service.refuse)
    app.add_exception_handler(Exception, service.refuse)
    app.add_middleware(HostGuard, host=config.host)
    app.add_middleware(Counting, count=service.metrics.requests)
    return app


class Counting:
    """Counts replies by status."""

    def __init__(self, app: Any, count: Any) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.count.labels(str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


def _json(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(values), status, headers, media_type="application/json")
