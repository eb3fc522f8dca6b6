"""Variants of a benchmark in processes of their own, which stay alive and measure one turn at a time."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from detkit.benchmarks.peer import Ask
from detkit.errors import DetkitError
from detkit.viz.console import setup_logging

Serve = Callable[..., None]  # called with a pipe and further arguments; see start_process


@contextmanager
def start_process(name: str, serve: Serve, *arguments: object) -> Iterator[tuple[Ask, Any]]:
    """Start ``serve(pipe, *arguments)``; yield a function that sends it a line and returns its answer.

    Args:
        name: of the variant, for messages.
        serve: sends a first message when it is ready, then one for each line received.
        arguments: anything that can be pickled.

    Yields:
        The function, and the first message.

    Raises:
        DetkitError: the process exits, or ``serve`` raises one; so does the function.
    """
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_run, args=(child_end, serve, arguments), daemon=True)
    process.start()
    child_end.close()

    def answer() -> Any:
        try:
            answer = parent_end.recv()
        except EOFError:
            raise DetkitError(f"the process of '{name}' has exited: see its output above") from None
        if isinstance(answer, str):
            raise DetkitError(f"'{name}' cannot be measured: {answer}")
        return answer

    def ask(line: str) -> Any:
        with suppress(BrokenPipeError):  # it has exited: answer() raises, or returns its last message
            parent_end.send(line)
        return answer()

    try:
        yield ask, answer()  # wait until it is ready, so that the processes start one after another
    finally:
        process.terminate()
        process.join()


def _run(pipe: Connection, serve: Serve, arguments: tuple[object, ...]) -> None:
    setup_logging()
    try:
        serve(pipe, *arguments)
    except DetkitError as error:
        pipe.send(str(error))
