"""Reading ahead: items are prepared in threads while the network computes."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL = 0.2  # seconds after which a waiting reader looks whether its consumer is gone


def prefetch(
    prepare: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int
) -> Generator[tuple[Item, "Future[Result]"], None, None]:
    """Yield each item with the future of its ``prepare(item)``, in order; at most ``depth`` items are read ahead.

    ``items`` is iterated in a thread of its own, so that a video is decoded meanwhile; what it raises is raised here,
    after the items before it. The threads end when the generator is closed.

    Args:
        prepare: called in ``threads`` threads; an exception is kept in the future.
        items: the source.
        threads: 0 prepares each item when it is asked for, without any thread.
        depth: number of items, 1 or more.
    """
    if threads < 1:
        for item in items:
            yield item, _call(prepare, item)
        return
    ready: queue.Queue[Any] = queue.Queue(depth)  # items with their futures, then None or an exception
    stopped = threading.Event()
    with ThreadPoolExecutor(threads, "detkit-read") as pool:
        entries = ((item, pool.submit(prepare, item)) for item in items)
        reader = threading.Thread(target=_feed, args=(entries, ready, stopped), name="detkit-source", daemon=True)
        reader.start()
        try:
            while (entry := ready.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry
        finally:
            stopped.set()
            reader.join(timeout=5)  # a camera may block; the thread is a daemon


def _feed(entries: Iterable[Any], ready: "queue.Queue[Any]", stopped: threading.Event) -> None:
    """Put the entries into the queue, then None, or the exception that iterating them raised."""

    def put(entry: Any) -> bool:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(entry, timeout=POLL)
                return True
        return False

    try:
        if all(put(entry) for entry in entries):
            put(None)
    except BaseException as error:  # raised in the consumer instead
        put(error)


def _call(prepare: Callable[[Item], Result], item: Item) -> "Future[Result]":
    future: Future[Result] = Future()
    try:
        future.set_result(prepare(item))
    except Exception as error:
        future.set_exception(error)
    return future
