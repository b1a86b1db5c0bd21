"""Reading ahead: the next items of an iterator are prepared in a thread."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """
    Yield `items`, of which a thread prepares up to `depth` in advance. None of them may be None.
    An exception of `items` is raised here. close() ends the thread after the item that it is
    preparing.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    try:
        upcoming = deque(thread.submit(next, items, None) for _ in range(depth))
        while (item := upcoming.popleft().result()) is not None:
            upcoming.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
