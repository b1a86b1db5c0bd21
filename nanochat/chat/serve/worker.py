"""
One thread that decodes for all requests of one model.

A job is queued; its prompt is read in pieces between the steps of other jobs; it runs, and ends as
done, cancelled or failed. Each turn of the loop reads at most PROMPT_TOKENS of prompts, then gives
every running row one token. Clients take turns: the next job is the oldest one of the next client.
A job starts when there are enough free rows, and enough memory for its keys and values.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nanochat.base.common import notice
from nanochat.base.runtime import out_of_memory, release_memory
from nanochat.chat.generate import Batch, Continuation, Engine, Entry, Token
from nanochat.chat.serve.requests import ApiError

PROMPT_TOKENS = 512  # read per turn, so that a long prompt delays running rows by little
QUEUE_LENGTH = 64
SHUTTING_DOWN = "the server is shutting down: try again later"
NO_MEMORY = "there is not enough memory for this request: shorten it, or ask for fewer answers"

Delivery = list[tuple[int, list[Token]]] | Exception  # (sample index, its new tokens), or a failure


@dataclass(eq=False)
class Job:
    """A request of a client. `deliver` is called on the worker's thread."""

    wanted: Continuation
    client: str
    deliver: Callable[[Delivery], None]
    state: str = "queued"  # queued, reading, running, done, cancelled, failed
    index: dict[int, int] = field(default_factory=dict)  # row number -> sample index
    unwanted: set[int] = field(default_factory=set)  # samples that need no more tokens

    @property
    def samples(self) -> int:
        return self.wanted.samples

    @property
    def ended(self) -> bool:
        return self.state in ("done", "cancelled", "failed")


@dataclass(eq=False)
class Reading:
    """
    Jobs whose prompts are read in the same passes, and which join the batch together. Jobs that end
    before that stay in the list.
    """

    jobs: list[Job]
    alone: bool = False  # no other job may be added
    entry: Entry | None = None

    def size_with(self, *others: Job) -> int:
        """Tokens of a pass over all prompts, with `others`, each padded to the longest."""
        jobs = [*self.jobs, *others]
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
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()  # by client, next client first
        self._reading: list[Reading] = []
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._closing = False
        self._deadline = float("inf")

    # ---- called from other threads

    @property
    def queued(self) -> int:
        return sum(map(len, self._queues.values()))

    @property
    def rows(self) -> int:
        """Rows of the jobs that run or whose prompts are being read."""
        return sum(job.samples for job in self._active)

    @property
    def _active(self) -> list[Job]:
        reading = [job for reading in self._reading for job in reading.jobs]
        return [job for job in (*reading, *self._running) if not job.ended]

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError 429 when the queue is full, 503 when the worker is closing."""
        with self._wake:
            if self._closing:
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
            self._queues.setdefault(job.client, deque()).append(job)
            self.counters.requests += 1
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job: it gets no more tokens, and its rows leave the batch before the next step."""
        with self._wake:
            if not job.ended:
                job.unwanted.update(range(job.samples))
                self._wake.notify()

    def drop_sample(self, job: Job, index: int) -> None:
        """One of a job's samples needs no more tokens."""
        with self._wake:
            job.unwanted.add(index)

    def close(self, grace_seconds: float = 10.0) -> None:
        """Accept no more jobs; running ones have `grace_seconds` to finish."""
        with self._wake:
            self._closing = True
            self._deadline = time.monotonic() + grace_seconds
            self._wake.notify()

    # ---- the thread

    def run(self) -> None:
        batch = Batch(self.engine, self.max_rows)
        while True:
            with self._wake:
                while not (self.queued or self._reading or self._running or self._closing):
                    self._wake.wait()
                if self._closing and self._finish_closing():
                    return
                self._remove_cancelled(batch)
                self._admit()
            try:
                self._read_prompts(batch)
                if len(batch):
                    self._step(batch)
            except Exception as error:  # a bug must not leave clients waiting for ever
                notice(f"all running answers failed ({type(error).__name__}: {error})")
                for job in self._active:
                    self._fail(job, error)
                batch = Batch(self.engine, self.max_rows)

    def _finish_closing(self) -> bool:
        """
        Whether the thread can end: nothing runs, or the deadline has passed. Waiting jobs fail.
        """
        late = time.monotonic() > self._deadline
        waiting = [job for queue in self._queues.values() for job in queue]
        self._queues.clear()
        for job in [*waiting, *(self._active if late else [])]:
            self._fail(job, ApiError(503, SHUTTING_DOWN))
        return late or not (self._reading or self._running)

    def _remove_cancelled(self, batch: Batch) -> None:
        for job in [job for job in self._active if job.unwanted]:
            rows = [number for number, i in job.index.items() if i in job.unwanted]
            for number in rows:
                batch.cancel(number)
                del job.index[number]
            if len(job.unwanted) == job.samples:
                self._end(job, "cancelled")
        for client, queue in list(self._queues.items()):
            for job in [job for job in queue if len(job.unwanted) == job.samples]:
                queue.remove(job)
                self._end(job, "cancelled")
            if not queue:
                del self._queues[client]

    def _end(self, job: Job, state: str) -> None:
        job.state = state
        if job in self._running:
            self._running.remove(job)
        self._reading = [r for r in self._reading if not all(j.ended for j in r.jobs)]
        self.counters.cancelled += state == "cancelled"
        self.counters.failed += state == "failed"

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job, "failed")
        job.deliver(error)

    def _admit(self) -> None:
        """
        Move jobs from the queues to reading, one client after the other, while rows and memory
        allow. Short prompts are read together.
        """
        for client in list(self._queues):
            while (queue := self._queues.get(client)) and self._fits(queue[0]):
                job = queue.popleft()
                self._queues.move_to_end(client)
                if not queue:
                    del self._queues[client]
                job.state = "reading"
                last = self._reading[-1] if self._reading else Reading([], alone=True)
                if not last.alone and not last.entry and last.size_with(job) <= PROMPT_TOKENS:
                    last.jobs.append(job)
                else:
                    self._reading.append(Reading([job]))
                if len(self._queues) > 1:
                    break  # the next client's turn

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

    def _read_prompts(self, batch: Batch) -> None:
        """Read up to PROMPT_TOKENS of prompts; jobs whose prompt is read join the batch."""
        budget = PROMPT_TOKENS
        while budget > 0 and self._reading:
            reading = self._reading[0]
            if reading.size_with() > budget and budget < PROMPT_TOKENS:
                return
            try:
                if reading.entry is None:
                    reading.entry = batch.open([job.wanted for job in reading.jobs])
                read = reading.entry.read(budget)
                budget -= read
                self.counters.prompt_tokens += read
                if not reading.entry.done:
                    continue
                numbers = list(batch.admit(reading.entry))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                release_memory()
                if len(reading.jobs) > 1:  # perhaps there is enough memory for each alone
                    jobs = [job for job in reading.jobs if not job.ended]
                    self._reading[:1] = [Reading([job], alone=True) for job in jobs]
                else:
                    self._fail(reading.jobs[0], ApiError(503, NO_MEMORY))
            else:
                self._reading.remove(reading)
                self._start(reading.jobs, batch, numbers)

    def _start(self, jobs: list[Job], batch: Batch, numbers: list[int]) -> None:
        """Run jobs that have joined the batch, with these rows; remove those that have ended."""
        for job in jobs:
            own, numbers = numbers[: job.samples], numbers[job.samples :]
            if job.ended:
                for number in own:
                    batch.cancel(number)
                continue
            job.index = {number: i for i, number in enumerate(own)}
            job.state = "running"
            self._running.append(job)

    def _step(self, batch: Batch) -> None:
        """
        Decode one token of every row and deliver them job by job. If memory runs out, the newest
        job fails and the others go on.
        """
        try:
            tokens = batch.step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            job = self._running[-1]
            for number in job.index:
                batch.cancel(number)
            self._fail(job, ApiError(503, NO_MEMORY))
            release_memory()
            return
        self.counters.steps += 1
        self.counters.generated_tokens += len(tokens)
        by_row: dict[int, list[Token]] = {}
        for token in tokens:
            by_row.setdefault(token.row, []).append(token)
        for job in list(self._running):
            news = [(i, by_row[number]) for number, i in job.index.items() if number in by_row]
            for i, new in news:
                if new[-1].finish:
                    job.unwanted.add(i)
                    job.index = {n: j for n, j in job.index.items() if j != i}
            if not job.index:
                self._end(job, "done")
            if news:
                job.deliver(news)
