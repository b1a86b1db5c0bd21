"""How the decoding threads pass news to the requests that wait for it in the event loop."""

import asyncio
from collections import deque
from contextlib import suppress

from nanochat.chat.serve.worker import Delivery

COALESCE_SECONDS = 0.03
KEEP_ALIVE_SECONDS = 15.0
News = tuple[int, Delivery]  # the number of a prompt, what its job has delivered


class Inbox(asyncio.Queue[News]):
    """The news of one request, until it is taken."""

    async def take(self) -> list[News]:
        """The news since the last call, awaited if there is none; [] after KEEP_ALIVE_SECONDS."""
        news = []
        with suppress(TimeoutError):
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                news.append(await self.get())
        while not self.empty():
            news.append(self.get_nowait())
        return news


class Mailbox:
    """
    What the decoding threads have for the event loop. It is handed over at most once per
    COALESCE_SECONDS and to all inboxes at once, by a timer that runs as long as there is news: the
    threads wake the loop for the first token alone.
    """

    def __init__(self):
        self._loop, self._planned = asyncio.get_running_loop(), False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[Inbox, News]] = deque()

    def put(self, inbox: Inbox, prompt: int, delivery: Delivery) -> None:
        """Called on any thread."""
        self._waiting.append((inbox, (prompt, delivery)))
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
            inbox, news = self._waiting.popleft()
            inbox.put_nowait(news)
