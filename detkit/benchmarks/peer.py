"""Running another project's code for comparison, in its own Python environment."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from detkit.errors import DetkitError

Ask = Callable[[str], Any]
QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


def peer_threads(python: str | int | None) -> dict[str, int]:
    """Return the rows of a comparison with a peer, each with its number of threads; 0: as many as it sets itself."""
    return {} if python is None else {"peer": 0, "peer_equal_threads": torch.get_num_threads()}


@contextmanager
def start_peer(
    python: str, script: str, arguments: Sequence[object], extra: Mapping[str, str] | None = None
) -> Iterator[Ask]:
    """Start a script in a peer's Python; yield a function that sends it a line and returns its answer.

    The script answers each line of its standard input with a line of JSON on its standard output, after a first one
    when it is ready. It runs in a temporary folder.

    Args:
        python: path of the Python of an environment with ultralytics.
        script: source code to run.
        arguments: command-line arguments of the script.
        extra: additional environment variables.

    Raises:
        DetkitError: the script cannot be started or exits; the message has its last line of output.
    """
    with tempfile.TemporaryDirectory(prefix="detkit-peer-") as folder, (Path(folder) / "log").open("w+") as log:
        try:
            process = subprocess.Popen(
                [python, "-c", script, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, **QUIET, "YOLO_CONFIG_DIR": folder, **(extra or {})},
            )
        except OSError as error:
            raise DetkitError(f"peer={python} cannot be run: {error.strerror}") from None

        def answer() -> Any:
            assert process.stdout is not None  # it is a pipe
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it exited"])[-1]
                raise DetkitError(f"peer={python} must be a Python with ultralytics installed: {last}")
            return json.loads(line)

        def ask(line: str) -> Any:
            with suppress(BrokenPipeError):  # it has exited: answer() raises with its last output
                print(line, file=process.stdin, flush=True)
            return answer()

        try:
            answer()
            yield ask
        finally:
            process.kill()
            process.communicate()
