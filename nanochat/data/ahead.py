"""Items in batches, and items that a thread prepares before they are needed."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], size_of: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """The items in lists whose sizes add up to `least` or more; the last list may have less."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= least:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
