"""Writing files in threads, beside the network."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

WAITING = 4  # jobs per thread that may wait; each holds an image


class Background:
    """Runs jobs that write files in threads, of which only WAITING per thread may wait.

    Args:
        threads: 0 runs each job at once.
        on_error: called with a message about a file that could not be written.
    """

    def __init__(self, threads: int, on_error: Callable[[str], None]) -> None:
        self.pool = ThreadPoolExecutor(threads, "detkit-write") if threads else None
        self.limit = WAITING * threads
        self.on_error = on_error
        self.jobs: deque[tuple[Path, Future[None]]] = deque()

    def submit(self, path: Path, write: Callable[..., None], *args: Any) -> None:
        """Run ``write(*args)``, which writes ``path``, as soon as a thread is free."""
        if self.pool is None:
            self.guard(path, lambda: write(*args))
            return
        self.jobs.append((path, self.pool.submit(write, *args)))
        while len(self.jobs) > self.limit:
            self._finish_first()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            while self.jobs and error is None:
                self._finish_first()
        finally:
            if self.pool is not None:
                self.pool.shutdown(cancel_futures=True)

    def _finish_first(self) -> None:
        path, future = self.jobs.popleft()
        self.guard(path, future.result)

    def guard(self, path: Path, job: Callable[[], None]) -> None:
        """Run a job now; report an OSError to ``on_error`` instead of raising it."""
        try:
            job()
        except OSError as error:
            self.on_error(f"cannot write {error.filename or path}: {error.strerror or error}")
