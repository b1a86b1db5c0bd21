"""
The routes of the server: the page, and the endpoints of OpenAI's API that a small chat model can
honour. An endpoint is a function below the line that routes to it. It logs no messages.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from nanochat.base.common import notice
from nanochat.chat.serve import bodies
from nanochat.chat.serve.call import Call
from nanochat.chat.serve.mailbox import Mailbox
from nanochat.chat.serve.models import Models, Served
from nanochat.chat.serve.prompts import chat_prompt, completion_prompts, rendered
from nanochat.chat.serve.requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Fields,
    T,
    TokenizeRequest,
    parse,
)

PAGE = {  # the files of the page, of which "/" is ui.html, and their types
    "/": "text/html",
    "/ui.css": "text/css",
    "/ui.js": "text/javascript",
    "/api.js": "text/javascript",
    "/store.js": "text/javascript",
    "/markdown.js": "text/javascript",
}
router = APIRouter()


def build_app(models: Models, load: Fields) -> FastAPI:
    """
    The app; it loads the first model in the background, with the arguments `load` of Models.load.
    """

    async def load_first(app: FastAPI) -> None:
        try:
            await asyncio.to_thread(models.load, **load)
        except Exception as error:  # else the page would wait for ever
            app.state.error = f"the model could not be loaded: {error}"
            notice(app.state.error)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.mailbox = Mailbox()
        task = asyncio.ensure_future(load_first(app))
        yield
        await task
        await asyncio.to_thread(models.close)

    app = FastAPI(
        openapi_url=None,  # nor pages of documentation, which need it
        lifespan=lifespan,
        exception_handlers={ApiError: _api_error, 404: _no_route, 405: _no_route},
    )
    app.state.models, app.state.error = models, ""
    app.include_router(router)
    return app


async def _api_error(_: Request, error: Any) -> Response:
    return error.response


async def _no_route(request: Request, error: Any) -> Response:
    status = error.status_code
    allowed = f"{request.method} is not allowed here"
    why = f"there is no {request.url.path}" if status == 404 else allowed
    return ApiError(status, why).response


# ---- the endpoints


async def _page(request: Request) -> Response:
    path = request.scope["path"]
    file = Path(__file__).with_name(path[1:] or "ui.html")
    return FileResponse(file, media_type=PAGE[path])


for path in PAGE:
    router.get(path)(_page)


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    return {"status": "ok", "model": _ready(request).default}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    totals = Counter(rows=0, queued=0)
    for worker in request.app.state.models.workers():
        totals.update(rows=worker.rows, queued=worker.queued)
        totals.update({f"{name}_total": n for name, n in vars(worker.counters).items()})
    text = ""
    for name, value in totals.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        text += f"# TYPE nanochat_{name} {kind}\nnanochat_{name} {value:g}\n"
    return Response(text, media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
def list_models(request: Request) -> Fields:  # in a thread, because it reads files
    return {"object": "list", "data": _ready(request).describe()}


@router.get("/v1/models/{id:path}")
def one_model(request: Request, id: str) -> Fields:
    for entry in _ready(request).describe():
        if entry["id"] == id:
            return entry
    raise ApiError(404, f"there is no model {id!r}: see /v1/models", "model", "model_not_found")


@router.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    asked, served = await _asked(request, ChatRequest)
    if served.stage == "base":
        raise ApiError(
            400, f"{served.id} is a base model: use /v1/completions, or another model", "model"
        )
    prompt, dropped = chat_prompt(served, asked)
    call = Call(served, asked, [prompt], dropped)
    return await _answer(request, bodies.ChatShape(call))


@router.post("/v1/completions")
async def complete(request: Request) -> Response:
    asked, served = await _asked(request, CompletionRequest)
    call = Call(served, asked, *completion_prompts(served, asked))
    return await _answer(request, bodies.CompletionShape(call, bool(asked.echo)))


@router.post("/tokenize")
async def tokenize(request: Request) -> Fields:
    asked, served = await _asked(request, TokenizeRequest)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if asked.prompt is not None:
        ids = served.tokenizer.encode(asked.prompt)
    else:
        ids, _ = rendered(served.tokenizer, asked.messages or [])
    return {"tokens": ids, "count": len(ids), "max_model_len": served.context}


# ---- what the endpoints share


def _ready(request: Request) -> Models:
    """The models. ApiError 503 until the first one has been loaded."""
    state = request.app.state
    if state.error:
        raise ApiError(503, state.error)
    if not state.models.default:
        raise ApiError(503, "the model is loading", code="loading", headers={"Retry-After": "1"})
    return state.models


async def _asked(request: Request, kind: type[T]) -> tuple[T, Served]:
    """What a request asks for, and the model that it names, loaded if necessary."""
    asked, models = parse(kind, await request.body()), _ready(request)
    served = models.loaded(asked.model) or await asyncio.to_thread(models.get, asked.model)
    return asked, served


async def _answer(request: Request, shape: bodies.Shape) -> Response:
    """Start the call of a shape; the response has its answers, streamed if that is asked for."""
    call, host = shape.call, request.client.host if request.client else ""
    state, client = request.app.state, f"{host} {call.request.user}"
    try:
        call.start(state.mailbox, client)
    except ApiError as error:
        if error.status != 503:
            raise
        # Another request has unloaded the model meanwhile, or the server ends and refuses again
        call.served = await asyncio.to_thread(state.models.get, call.request.model)
        call.start(state.mailbox, client)
    if call.request.stream:
        unbuffered = {"X-Accel-Buffering": "no"}  # or a proxy, such as nginx, collects the events
        return StreamingResponse(bodies.events(shape), 200, unbuffered, "text/event-stream")
    work = asyncio.ensure_future(bodies.whole(shape))
    hung_up = asyncio.ensure_future(request.receive())  # the next message after the body
    try:
        await asyncio.wait({work, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        hung_up.cancel()
        call.cancel()
