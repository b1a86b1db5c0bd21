"""
One thread that decodes for all requests of one model.

A job is queued; its prompt is read in pieces between the steps of other jobs; it runs, and ends as
done, cancelled or failed. Each turn of the loop reads at most PROMPT_TOKENS of prompts, then gives
every running row one token. Clients take turns: the next job is the oldest one of the next client.
A job starts when there are enough free rows, and enough memory for its keys and values.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanochat.base.common import notice
from nanochat.base.runtime import out_of_memory, release_memory
from nanochat.chat.generate import Batch, Continuation, Engine, Entry, Token
from nanochat.chat.serve.requests import ApiError

PROMPT_TOKENS = 512  # read per turn, so that a long prompt delays running rows by little
QUEUE_LENGTH = 64
SHUTTING_DOWN = "the server is shutting down: try again later"
NO_MEMORY = "there is not enough memory for this request: shorten it, or ask for fewer answers"

Delivery = dict[int, list[Token]] | Exception  # the new tokens of samples by index, or a failure


@dataclass(eq=False)
class Job:
    """A request of a client. `deliver` is called on the worker's thread."""

    wanted: Continuation
    client: str
    deliver: Callable[[Delivery], None]
    ended: str = ""  # how: done, cancelled or failed
    index: dict[int, int] = field(default_factory=dict)  # row number -> sample index
    unwanted: set[int] = field(default_factory=set)  # samples that need no more tokens
    alone: bool = False  # its prompt must not be read together with others

    @property
    def samples(self) -> int:
        return self.wanted.samples


def padded_size(jobs: Sequence[Job]) -> int:
    """Tokens of a pass over the prompts of these jobs, each padded to the longest."""
    return len(jobs) * max(len(job.wanted.prompt) for job in jobs)


@dataclass
class Counters:
    """For /metrics."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


class Worker(threading.Thread):
    """Decodes with one engine until close(). Thread-safe: submit, cancel, drop_sample, close."""

    def __init__(self, engine: Engine, max_rows: int = 32, kv_bytes: float = float("inf")):
        super().__init__(daemon=True, name="nanochat decoding")
        self.engine, self.max_rows, self.kv_bytes = engine, max_rows, kv_bytes
        self.counters = Counters()
        self._batch = Batch(engine, max_rows)
        self._queue: list[Job] = []  # the jobs of the client whose turn is next come first
        self._reading: list[Job] = []  # whose prompts are read in the same passes
        self._entry: Entry | None = None  # their rows, once reading has begun
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._deadline = 0.0  # when the last answers end; 0 while the worker accepts jobs

    # ---- called from other threads

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def rows(self) -> int:
        """Rows of the jobs that run or whose prompts are being read."""
        return sum(job.samples for job in self._active)

    @property
    def _active(self) -> list[Job]:
        return [job for job in (*self._reading, *self._running) if not job.ended]

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 429 when the queue is full, 503 when the worker is closing."""
        with self._wake:
            if self._deadline:
                raise ApiError(503, SHUTTING_DOWN)
            if self.queued >= QUEUE_LENGTH:
                raise ApiError(
                    429,
                    f"{QUEUE_LENGTH} requests are waiting already: try again later",
                    code="queue_full",
                    headers={"Retry-After": "2"},
                )
            if job.samples > self.max_rows:
                raise ApiError(400, f"n is at most {self.max_rows} on this server", "n")
            self._queue.append(job)
            self.counters.requests += 1
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job: it gets no more tokens, and its rows leave the batch before the next step."""
        with self._wake:
            # Nothing is left to cancel of answers that have ended at a stop string
            if not job.ended and len(job.unwanted) < job.samples:
                self.counters.cancelled += 1
                job.unwanted.update(range(job.samples))
                self._wake.notify()

    def drop_sample(self, job: Job, index: int) -> None:
        """One of a job's samples needs no more tokens."""
        with self._wake:
            job.unwanted.add(index)

    def close(self, grace_seconds: float) -> None:
        """Accept no more jobs; running ones have `grace_seconds` to finish."""
        with self._wake:
            self._deadline = time.monotonic() + grace_seconds
            self._wake.notify()

    def close_if_idle(self) -> bool:
        """Accept no more jobs if there are none; returns whether there were none."""
        with self._wake:
            idle = not (self._queue or self._active)
            if idle:
                self.close(0)
        return idle

    # ---- the thread

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._queue or self._reading or self._running or self._deadline
                )
                if self._deadline and self._finish_closing():
                    return
                self._remove_cancelled()
            try:
                self._read_prompts()
                if len(self._batch):
                    self._step()
            except Exception as error:  # a bug must not leave clients waiting for ever
                notice(f"all running answers failed ({type(error).__name__}: {error})")
                self._batch = Batch(self.engine, self.max_rows)
                for job in self._active:
                    self._fail(job, error)

    def _finish_closing(self) -> bool:
        """
        Whether the thread can end: nothing runs, or the deadline has passed. Waiting jobs fail.
        """
        late = time.monotonic() > self._deadline
        for job in [*self._queue, *(self._active if late else [])]:
            self._fail(job, ApiError(503, SHUTTING_DOWN))
        return late or not (self._reading or self._running)

    def _remove_cancelled(self) -> None:
        for job in [*self._queue, *self._active]:
            for number in [number for number, i in job.index.items() if i in job.unwanted]:
                self._batch.cancel(number)
                del job.index[number]
            if len(job.unwanted) == job.samples:
                self._end(job, "cancelled")

    def _end(self, job: Job, how: str) -> None:
        """End a job, and the rows that it still has."""
        job.ended = how
        for jobs in (self._queue, self._running):
            if job in jobs:
                jobs.remove(job)
        if all(one.ended for one in self._reading):
            self._reading, self._entry = [], None
        for number in job.index:
            self._batch.cancel(number)
        self.counters.failed += how == "failed"

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job, "failed")
        job.deliver(error)

    def _admit(self) -> None:
        """
        Begin to read jobs of the queue, one client after the other, while rows and memory allow.
        Short prompts are read together.
        """
        for job in iter(self._next, None):
            jobs = [*self._reading, job]
            separate = any(one.alone for one in jobs) or padded_size(jobs) > PROMPT_TOKENS
            if self._reading and separate:
                return
            self._reading = jobs
            self._queue.remove(job)
            self._queue = sorted(self._queue, key=lambda other: other.client == job.client)

    def _next(self) -> Job | None:
        """The first job of the queue that fits; the jobs of a client do not overtake each other."""
        oldest: dict[str, Job] = {}
        for job in self._queue:
            oldest.setdefault(job.client, job)
        return next(filter(self._fits, oldest.values()), None)

    def _fits(self, job: Job) -> bool:
        """
        Whether there is room for a job now. A client may use three quarters of the rows, or more
        for a single job.
        """
        if not self.rows:
            return True
        rows = self.rows + job.samples
        own = job.samples + sum(j.samples for j in self._active if j.client == job.client)
        share = max(job.samples, self.max_rows * 3 // 4)
        memory = rows * self.engine.row_bytes()
        return rows <= self.max_rows and own <= share and memory <= self.kv_bytes

    def _read_prompts(self) -> None:
        """Read up to PROMPT_TOKENS of prompts; jobs whose prompt is read join the batch."""
        budget = PROMPT_TOKENS
        while budget > 0:
            if not self._reading:
                with self._wake:
                    self._admit()
            jobs = self._reading
            if not jobs or (padded_size(jobs) > budget and budget < PROMPT_TOKENS):
                return
            try:
                if self._entry is None:
                    self._entry = self._batch.open([job.wanted for job in jobs])
                read = self._entry.read(budget)
                budget -= read
                self.counters.prompt_tokens += read
                if not self._entry.done:
                    continue
                numbers = iter(self._batch.admit(self._entry))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._entry = None
                release_memory()
                if len(jobs) == 1:
                    self._fail(jobs[0], ApiError(503, NO_MEMORY))
                    continue
                for job in jobs:  # perhaps there is enough memory for each alone
                    job.alone = True
                with self._wake:
                    self._queue = [*(job for job in jobs if not job.ended), *self._queue]
                    self._reading = []
            else:
                for job in jobs:
                    job.index = {next(numbers): i for i in range(job.samples)}
                    if not job.ended:
                        self._running.append(job)
                        continue
                    for number in job.index:
                        self._batch.cancel(number)
                self._reading, self._entry = [], None

    def _step(self) -> None:
        """
        Decode one token of every row and deliver them job by job. If memory runs out, the newest
        job fails and the others go on.
        """
        try:
            tokens = self._batch.step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._fail(self._running[-1], ApiError(503, NO_MEMORY))
            release_memory()
            return
        self.counters.steps += 1
        self.counters.generated_tokens += len(tokens)
        owners = {number: job for job in self._running for number in job.index}
        news: dict[Job, dict[int, list[Token]]] = {}
        for token in tokens:
            job = owners[token.row]
            i = job.index[token.row]
            news.setdefault(job, {}).setdefault(i, []).append(token)
            if token.finish:
                job.unwanted.add(i)
                del job.index[token.row]
        for job, new in news.items():
            if not job.index:
                self._end(job, "done")
            job.deliver(new)
