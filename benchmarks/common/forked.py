"""Processes for tests that start or kill several: forked from one that has imported everything, so that each costs a
fraction of a second of processor time instead of several seconds.

The fork server is Python's own. Each worker of pytest starts one when it first needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import httpx

from benchmarks.common.serving import STARTUP_S, Server

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["benchmarks.common.forked", "server.app", "server.chat.terminal", "server.feedback.adding"]
)
COMMAND = "from server import cli; cli.main()"


def forked(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function of a module in a new process. Arguments can be pickled."""
    process = FORKS.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


class ForkedCommand:
    """`trimtab` with some words, as `subprocess.Popen` would run it with pipes, or other code with them as its
    arguments. Its environment is the one that is given."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        *,
        code: str = COMMAND,
        directory: Path | None = None,
        output: Path | None = None,
        errors: Path | None = None,
    ) -> None:
        """What it prints goes into the files `output` and `errors`, else into pipes."""
        self.args = list(words)
        given, self.stdin = _writing()
        printed, self.stdout = (None, None) if output else _reading()
        complaints, self.stderr = (None, None) if errors else _reading()
        streams = (given, printed or output, complaints or errors)
        self._process = forked(_run, code, self.args, dict(environment), directory or Path.cwd(), streams)
        for end in (given, printed, complaints):
            if end is not None:
                end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise TimeoutError(f"{self.args} has not ended within {timeout} s")
        return code

    def communicate(self, text: str, timeout: float) -> tuple[str, str]:
        """Send it a text as the rest of its input. Returns what it prints to the end, if that is less than a pipe holds
        for stderr."""
        assert self.stdout is not None
        assert self.stderr is not None
        with suppress(BrokenPipeError):  # it has ended
            self.stdin.write(text)
            self.stdin.close()
        printed, errors = self.stdout.read(), self.stderr.read()
        self.wait(timeout)
        return printed, errors

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __enter__(self) -> ForkedCommand:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()


@contextmanager
def forked_server(profiles: Path, log: Path, **settings: Any) -> Iterator[Server]:
    """`trimtab serve`, ready, on the demo model. It is killed at the end. What it prints goes into a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {f"TRIMTAB_{name.upper()}": str(value) for name, value in {"threads": 1, **settings}.items()}
    words = ["serve", "--port", str(port), "--profiles", str(profiles)]
    url = f"http://127.0.0.1:{port}"
    with ForkedCommand(words, {**os.environ, **given}, output=log, errors=log) as process:
        end = time.monotonic() + STARTUP_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not become ready: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield Server(url, process.pid)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=STARTUP_S).status_code == 200
    except httpx.TransportError:
        return False


def _writing() -> tuple[Connection, TextIO]:
    """A pipe's end for a child to read from, and a file that writes into it."""
    read, write = FORKS.Pipe(duplex=False)
    return read, _file(write, "w")


def _reading() -> tuple[Connection, TextIO]:
    """A pipe's end for a child to write into, and a file that reads from it."""
    read, write = FORKS.Pipe(duplex=False)
    return write, _file(read, "r")


def _file(end: Connection, mode: str) -> TextIO:
    with end:
        return os.fdopen(os.dup(end.fileno()), mode, encoding="utf-8")


def _run(
    code: str,
    words: Sequence[str],
    environment: Mapping[str, str],
    directory: Path,
    streams: Sequence[Connection | Path],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, stream in enumerate(streams):
        with stream.open("ab") if isinstance(stream, Path) else stream as end:
            os.dup2(end.fileno(), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    sys.argv = ["trimtab", *words]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
