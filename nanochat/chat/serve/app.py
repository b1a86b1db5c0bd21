"""
The routes of the server: the page, and the endpoints of OpenAI's API that a small chat model can
honour. It logs no messages.
"""

import asyncio
import functools
import json
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from nanochat.base.common import UserError, notice
from nanochat.chat.generate import Continuation, Sampling
from nanochat.chat.reply import fit_conversation
from nanochat.chat.serve.answer import Answer, Delta, chat_logprobs, completion_logprobs
from nanochat.chat.serve.models import Models, Served
from nanochat.chat.serve.requests import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    conversation,
    parse,
)
from nanochat.chat.serve.worker import Delivery, Job

PAGE = {
    "/": ("ui.html", "text/html"),
    "/ui.css": ("ui.css", "text/css"),
    "/ui.js": ("ui.js", "text/javascript"),
    "/api.js": ("api.js", "text/javascript"),
    "/store.js": ("store.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
}
TEMPERATURE, TOP_K = 0.6, 50  # where a request says nothing, as in the terminal
COALESCE_SECONDS = 0.03
KEEP_ALIVE_SECONDS = 15.0
MOST_SECONDS = 600.0  # of one request


@dataclass(eq=False)
class Call:
    """
    One request that is being answered: its jobs (one per prompt), their answers, and the events
    that the worker sends.
    """

    served: Served
    id: str
    prompts: list[list[int]]
    answers: list[Answer]
    jobs: list[Job] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    news: list[tuple[int, Delivery]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    alternatives: int | None = None
    seed: int = 0
    dropped: int = 0  # exchanges of a chat, or tokens of prompts, that truncation left out
    _clock: asyncio.TimerHandle | None = None

    @property
    def base(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "created": int(time.time()),
            "model": self.served.id,
            "system_fingerprint": self.served.fingerprint,
        }

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        completion = sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    @property
    def extension(self) -> dict[str, Any]:
        """What the page shows beside the answer."""
        seconds = max(1e-6, time.monotonic() - self.began)
        speed = sum(answer.tokens for answer in self.answers) / seconds
        return {"seed": self.seed, "dropped": self.dropped, "tokens_per_second": round(speed, 1)}

    def cancel(self) -> None:
        for job in self.jobs:
            self.served.worker.cancel(job)

    def start(
        self,
        request: Request,
        sampling: Sampling,
        limit: int | None,
        samples: int,
        user: str | None,
    ) -> None:
        """
        Submit a job for each prompt. Sample i of a prompt draws as the terminal's sample i does.
        """
        mailbox: Mailbox = request.app.state.mailbox
        client = f"{request.client.host if request.client else ''} {user}"  # for taking turns
        for p, prompt in enumerate(self.prompts):
            wanted = Continuation(prompt, f"{self.seed}/{p}", sampling, limit, samples)
            job = Job(wanted, client, functools.partial(mailbox.put, self, p))
            try:
                self.served.worker.submit(job)
            except ApiError:
                self.cancel()
                raise
            self.jobs.append(job)

    async def deltas(self) -> AsyncIterator[dict[int, Delta] | None]:
        """
        What new tokens add, by answer, as often as the mailbox brings any; None where nothing has
        come when KEEP_ALIVE_SECONDS have passed again. Ends when all answers have; raises ApiError
        when the worker fails. Whoever leaves early cancels the jobs.
        """
        self._tick()
        try:
            while not all(answer.finished for answer in self.answers):
                if time.monotonic() - self.began > MOST_SECONDS:
                    raise ApiError(503, f"the answer took longer than {MOST_SECONDS:.0f} s")
                await self.arrived.wait()
                self.arrived.clear()
                batch, self.news = self.news, []
                if not batch:
                    yield None
                elif news := self._merged(batch):
                    yield news
        finally:
            if self._clock is not None:
                self._clock.cancel()
            self.cancel()

    def _tick(self) -> None:
        """Wake deltas() after every KEEP_ALIVE_SECONDS: cheaper than a timeout for every wait."""
        if self._clock is not None:
            self.arrived.set()
        self._clock = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._tick)

    def _merged(self, batch: Sequence[tuple[int, Delivery]]) -> dict[int, Delta]:
        tokens: dict[int, list] = {}
        for p, delivery in batch:
            if isinstance(delivery, ApiError):
                raise delivery
            if isinstance(delivery, UserError):
                raise ApiError(503, str(delivery))
            if isinstance(delivery, Exception):
                raise ApiError(500, "the server failed to answer; its log says why") from delivery
            for sample, new in delivery:
                tokens.setdefault(p * self.jobs[p].samples + sample, []).extend(new)
        news = {}
        for i, new in tokens.items():
            if delta := self.answers[i].push(new):
                news[i] = delta
            if self.answers[i].stopped:
                p, sample = divmod(i, self.jobs[0].samples)
                self.served.worker.drop_sample(self.jobs[p], sample)
        return news


class Mailbox:
    """
    What the decoding threads have for the event loop. It is handed over at most once per
    COALESCE_SECONDS and to all calls at once, by a timer that runs as long as there is news: the
    threads wake the loop for the first token alone.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._planned = loop, False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[Call, int, Delivery]] = deque()

    def put(self, call: Call, prompt: int, news: Delivery) -> None:
        """Called on any thread."""
        self._waiting.append((call, prompt, news))
        if not self._planned:
            self._planned = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits for news any more
                self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._planned = False  # before the look, so that no news waits for ever
        if not self._waiting:
            return
        self._planned = True
        self._timer = self._loop.call_later(COALESCE_SECONDS, self._hand_over)
        while self._waiting:
            call, prompt, news = self._waiting.popleft()
            call.news.append((prompt, news))
            call.arrived.set()


# ---- the two shapes of answers


class ChatShape:
    """chat.completion and its chunks."""

    name = "chat.completion"

    def __init__(self, call: Call):
        self.call = call

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk of every choice has the role."""
        return [
            {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for i in range(len(self.call.answers))
        ]

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Any] | None:
        if self.call.alternatives is None:
            return None
        return chat_logprobs(self.call.served.tokenizer, tokens)

    def chunk(self, i: int, delta: Delta) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if delta.text:
            content["content"] = delta.text
        if any(part["type"] != "text" for part in delta.parts):
            content["nanochat"] = {"parts": delta.parts}
        choice = {"index": i, "delta": content, "finish_reason": delta.finish or None}
        if logprobs := self._logprobs(delta.tokens):
            choice["logprobs"] = logprobs
        return choice

    def whole(self, i: int, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if any(part["type"] != "text" for part in delta.parts):
            message["nanochat"] = {"parts": delta.parts}
        return {
            "index": i,
            "message": message,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.finish,
        }


class CompletionShape:
    """
    text_completion, the same in chunks. `echo` holds the prompts' texts where they are to be
    repeated.
    """

    name = "text_completion"

    def __init__(self, call: Call, echo: Sequence[str] = ()):
        self.call, self.echo = call, list(echo)
        self._length = [len(text) for text in self.echo] or [0] * len(call.answers)

    def opening(self) -> list[dict[str, Any]]:
        return [
            {"index": i, "text": text, "logprobs": None, "finish_reason": None}
            for i, text in enumerate(self.echo)
        ]

    def chunk(self, i: int, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self.call.alternatives is not None:
            tokenizer = self.call.served.tokenizer
            logprobs = completion_logprobs(tokenizer, delta.tokens, self._length[i])
            self._length[i] += sum(map(len, logprobs["tokens"]))
        finish = delta.finish or None
        return {"index": i, "text": delta.text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, i: int, delta: Delta) -> dict[str, Any]:
        choice = self.chunk(i, delta)
        choice["text"] = (self.echo[i] if self.echo else "") + choice["text"]
        return choice


Shape = ChatShape | CompletionShape


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)


def _event(data: dict[str, Any]) -> str:
    return f"data: {_json(data)}\n\n"


async def _streamed(call: Call, shape: Shape, wants_usage: bool) -> AsyncIterator[str]:
    """
    The events of a streamed answer. An error in the middle is an event, and then the stream ends
    without [DONE].
    """
    kind = "chat.completion.chunk" if isinstance(shape, ChatShape) else shape.name
    head = {**call.base, "object": kind}
    start = _json(head)[:-1] + ', "choices": ['  # the same in every chunk
    # Each piece that is handed on costs a turn of the event loop: the first one waits for the first
    # token, and the last one has the usage and [DONE].
    piece = "".join(
        _event({**head, "choices": [choice], "nanochat": call.extension})
        for choice in shape.opening()
    )
    try:
        async for news in call.deltas():
            chunks = [_json(shape.chunk(i, delta)) for i, delta in (news or {}).items()]
            piece += "".join(f"data: {start}{chunk}]}}\n\n" for chunk in chunks)
            if not all(answer.finished for answer in call.answers):
                yield piece if news else ": waiting\n\n"
                piece = "" if news else piece
    except ApiError as error:
        yield _event(error.body)
        return
    if wants_usage:
        piece += _event({**head, "choices": [], "usage": call.usage, "nanochat": call.extension})
    yield piece + "data: [DONE]\n\n"


async def _whole(call: Call, shape: Shape) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    sums = [Delta() for _ in call.answers]
    async for news in call.deltas():
        for i, delta in (news or {}).items():
            for part in delta.parts:
                sums[i].add(part["type"], part["text"])
            sums[i].tokens += delta.tokens
            sums[i].finish = delta.finish or sums[i].finish
    choices = [shape.whole(i, delta) for i, delta in enumerate(sums)]
    body = {**call.base, "object": shape.name, "choices": choices, "usage": call.usage}
    return {**body, "nanochat": call.extension}


async def _until_gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _answer(
    request: Request, call: Call, shape: Shape, stream: bool, usage: bool
) -> Response:
    if stream:
        return StreamingResponse(_streamed(call, shape, usage), media_type="text/event-stream")
    work = asyncio.ensure_future(_whole(call, shape))
    watch = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        return JSONResponse(work.result())
    finally:
        work.cancel()
        watch.cancel()
        call.cancel()


# ---- from a request to a call


def _sampling(body: ChatRequest | CompletionRequest) -> Sampling:
    return Sampling(
        TEMPERATURE if body.temperature is None else body.temperature,
        TOP_K if body.top_k is None else body.top_k,
        body.top_p,
        body.alternatives,
    )


def _too_long(tokens: int, context: int, param: str) -> ApiError:
    return ApiError(
        400,
        f"the prompt has {tokens:,} tokens and the context {context:,}: shorten it",
        param,
        "context_length_exceeded",
    )


def _open_call(
    served: Served, name: str, prompts: list[list[int]], body: ChatRequest | CompletionRequest
) -> Call:
    samples = body.n or 1
    plain = isinstance(body, CompletionRequest)
    answers = [Answer(served.tokenizer, body.stops, plain) for _ in range(samples * len(prompts))]
    call = Call(served, f"{name}-{uuid.uuid4().hex}", prompts, answers)
    call.alternatives = body.alternatives
    call.seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    return call


def _chat_prompt(served: Served, body: ChatRequest) -> tuple[list[int], int]:
    """The prompt's tokens and how many exchanges were left out to make room."""
    talk, dropped = conversation(body.messages), 0
    try:
        if body.truncation == "auto":
            talk, dropped = fit_conversation(served.tokenizer, talk, served.prompt_room)
        prompt = served.tokenizer.render_prompt(talk)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None
    if len(prompt) >= served.context:
        raise _too_long(len(prompt), served.context, "messages")
    return prompt, dropped


def _completion_prompts(served: Served, body: CompletionRequest) -> tuple[list[list[int]], int]:
    """
    The prompts' tokens, each with <|bos|> before it, and how many first tokens were left out to
    make room.
    """
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= 8:
        raise ApiError(400, f"prompt takes 1 to 8 prompts (got {len(given)})", "prompt")
    tokenizer = served.tokenizer
    prompts, dropped = [], 0
    for one in given:
        ids = tokenizer.encode(one) if isinstance(one, str) else list(one)
        if any(not 0 <= id < tokenizer.vocab_size for id in ids):
            raise ApiError(400, f"token ids are 0 to {tokenizer.vocab_size - 1}", "prompt")
        if ids[:1] != [tokenizer.bos]:
            ids = [tokenizer.bos, *ids]
        if body.truncation == "auto" and len(ids) > served.prompt_room:
            dropped += len(ids) - served.prompt_room
            ids = [tokenizer.bos, *ids[1 - served.prompt_room :]]
        if len(ids) >= served.context:
            raise _too_long(len(ids), served.context, "prompt")
        prompts.append(ids)
    return prompts, dropped


# ---- the app


def _metrics(models: Models) -> str:
    """Prometheus text."""
    totals: dict[str, float] = {"rows": 0, "queued": 0}
    for worker in models.workers():
        totals["rows"] += worker.rows
        totals["queued"] += worker.queued
        for name, value in vars(worker.counters).items():
            totals[f"{name}_total"] = totals.get(f"{name}_total", 0) + value
    lines = []
    for name, value in totals.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE nanochat_{name} {kind}", f"nanochat_{name} {value:g}"]
    return "\n".join(lines) + "\n"


def build_app(models: Models, load: dict[str, Any]) -> FastAPI:
    """
    The app; it loads the first model in the background, with the arguments `load` of Models.load.
    """
    state: dict[str, str] = {"error": ""}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.mailbox = Mailbox(asyncio.get_running_loop())

        async def load_first() -> None:
            try:
                await asyncio.to_thread(models.load, **load)
            except Exception as error:  # else the page would wait for ever
                state["error"] = f"the model could not be loaded: {error}"
                notice(state["error"])

        task = asyncio.ensure_future(load_first())
        yield
        await task
        await asyncio.to_thread(models.close)

    app = FastAPI(
        title="nanochat", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> Response:
        return JSONResponse(ApiError(404, f"there is no {request.url.path}").body, 404)

    @app.exception_handler(405)
    async def not_allowed(request: Request, _: Exception) -> Response:
        return JSONResponse(ApiError(405, f"{request.method} is not allowed here").body, 405)

    def page(name: str, kind: str):
        async def send() -> Response:
            return FileResponse(Path(__file__).parent / name, media_type=kind)

        return send

    for path, (name, kind) in PAGE.items():
        app.get(path)(page(name, kind))

    def ready() -> None:
        if state["error"]:
            raise ApiError(503, state["error"])
        if not models.default:
            raise ApiError(
                503, "the model is loading", code="loading", headers={"Retry-After": "1"}
            )

    async def served_model(id: str) -> Served:
        ready()
        return models.loaded(id) or await asyncio.to_thread(models.get, id)

    @app.get("/health")
    async def health() -> dict[str, str]:
        ready()
        return {"status": "ok", "model": models.default}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(_metrics(models), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        ready()
        return {"object": "list", "data": await asyncio.to_thread(models.describe)}

    @app.get("/v1/models/{id:path}")
    async def one_model(id: str) -> dict[str, Any]:
        ready()
        for entry in await asyncio.to_thread(models.describe):
            if entry["id"] == id:
                return entry
        raise ApiError(404, f"there is no model {id!r}", "model", "model_not_found")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parse(ChatRequest, await request.body())
        served = await served_model(body.model)
        if served.stage == "base":
            raise ApiError(
                400, f"{served.id} is a base model: use /v1/completions, or another model", "model"
            )
        prompt, dropped = _chat_prompt(served, body)
        call = _open_call(served, "chatcmpl", [prompt], body)
        call.dropped = dropped
        call.start(request, _sampling(body), body.limit, body.n or 1, body.user)
        return await _answer(request, call, ChatShape(call), bool(body.stream), body.wants_usage)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = parse(CompletionRequest, await request.body())
        served = await served_model(body.model)
        prompts, dropped = _completion_prompts(served, body)
        call = _open_call(served, "cmpl", prompts, body)
        call.dropped = dropped
        call.start(request, _sampling(body), body.limit or 16, body.n or 1, body.user)
        texts = [served.tokenizer.decode(ids[1:]) for ids in prompts for _ in range(body.n or 1)]
        shape = CompletionShape(call, texts if body.echo else ())
        return await _answer(request, call, shape, bool(body.stream), body.wants_usage)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = parse(TokenizeRequest, await request.body())
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        served = await served_model(body.model)
        if body.prompt is not None:
            ids = served.tokenizer.encode(body.prompt)
        else:
            try:
                ids = served.tokenizer.render_prompt(conversation(body.messages or []))
            except UserError as error:
                raise ApiError(400, str(error), "messages") from None
        return {"tokens": ids, "count": len(ids), "max_model_len": served.context}

    return app
