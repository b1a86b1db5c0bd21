"""One request that is being answered: its jobs for the worker, and what their tokens add."""

import functools
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from nanochat.base.common import UserError
from nanochat.chat.generate import Continuation
from nanochat.chat.serve.answer import Answer, Delta
from nanochat.chat.serve.mailbox import Inbox, Mailbox, News
from nanochat.chat.serve.models import Served
from nanochat.chat.serve.requests import (
    ApiError,
    CompletionRequest,
    GenerationRequest,
    sampling_of,
)
from nanochat.chat.serve.worker import Job

MOST_SECONDS = 600.0  # of one request


class Call:
    """
    A request with the tokens of its prompts and, for every sample of every prompt, an answer.
    `dropped` counts what truncation left out: exchanges of a chat, or tokens of prompts.
    """

    def __init__(
        self,
        served: Served,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        dropped: int,
    ):
        self.served, self.request = served, request
        self.prompts, self.dropped = prompts, dropped
        self.seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        self.began = time.monotonic()
        self._samples = request.n or 1  # of each prompt
        plain = isinstance(request, CompletionRequest)
        self.answers = [
            Answer(served.tokenizer, request.stops, plain)
            for _ in range(len(prompts) * self._samples)
        ]
        self._jobs: list[Job] = []  # since the last start()
        self._inbox = Inbox()

    def start(self, mailbox: Mailbox, client: str) -> None:
        """
        Submit a job for each prompt. Sample i of a prompt draws as the terminal's sample i does.
        """
        sampling, limit = sampling_of(self.request), self.request.limit
        self._jobs = []
        for p, prompt in enumerate(self.prompts):
            wanted = Continuation(prompt, f"{self.seed}/{p}", sampling, limit, self._samples)
            job = Job(wanted, client, functools.partial(mailbox.put, self._inbox, p))
            try:
                self.served.worker.submit(job)
            except ApiError:
                self.cancel()
                raise
            self._jobs.append(job)

    def cancel(self) -> None:
        """Stop all jobs; does nothing to those that have ended."""
        for job in self._jobs:
            self.served.worker.cancel(job)

    @property
    def finished(self) -> bool:
        return all(answer.stopped or answer.reply.finish for answer in self.answers)

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        """
        What new tokens add, by answer, as often as the mailbox brings any; {} when nothing has come
        for KEEP_ALIVE_SECONDS. Ends when all answers have; raises ApiError when the worker fails.
        Whoever leaves early cancels the jobs.
        """
        try:
            while not self.finished:
                if time.monotonic() - self.began > MOST_SECONDS:
                    raise ApiError(
                        503, f"the answer took longer than {MOST_SECONDS:.0f} s: ask for less"
                    )
                news = await self._inbox.take()
                deltas = self._merged(news)
                if deltas or not news:
                    yield deltas
        finally:
            self.cancel()

    def _merged(self, news: Sequence[News]) -> dict[int, Delta]:
        tokens: dict[int, list] = {}
        for p, delivery in news:
            if isinstance(delivery, ApiError):
                raise delivery
            if isinstance(delivery, UserError):
                raise ApiError(503, str(delivery))
            if isinstance(delivery, Exception):
                raise ApiError(500, "the server failed to answer; its log says why") from delivery
            for sample, new in delivery.items():
                tokens.setdefault(p * self._samples + sample, []).extend(new)
        deltas = {}
        for i, new in tokens.items():
            answer = self.answers[i]
            if answer.stopped:  # and the worker has not yet dropped the sample
                continue
            deltas[i] = answer.push(new)
            if answer.stopped:
                p, sample = divmod(i, self._samples)
                self.served.worker.drop_sample(self._jobs[p], sample)
        return deltas
