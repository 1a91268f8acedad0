"""A peer's process, controlled over pipes.

An idle peer is stopped by a signal, with all its threads, so that it does not spin while another peer is measured.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.peers.commands import Batch, Setup

HERE = Path(__file__).resolve().parent
LOADING_S = 900
COMMAND_S = 1800
LAST_WORDS = 2000
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}


class PeerFailed(RuntimeError):
    """A failed command of a peer, with its output."""


class PeerProcess:
    """A loaded peer. `version` is its own name and version."""

    def __init__(self, process: subprocess.Popen[str], log: Path, setup: Setup) -> None:
        self._process, self._log, self._setup = process, log, setup
        self.version: str = self._ask(asdict(setup), LOADING_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, *, rows: int, context: int, new: int, seed: int, text: bool = False) -> Any:
        """Run a method of `Peer` and return its result. With `text`, prompts are excerpts of the setup's text, if it
        has one."""
        batch = Batch(rows, context, new, seed, self._setup.vocabulary, self._setup.text if text else ())
        return self._ask({"command": command, **asdict(batch)}, COMMAND_S)

    def _ask(self, line: dict[str, Any], seconds: float) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            print(json.dumps(line), file=self._process.stdin, flush=True)
            ready, _, _ = select.select([self._process.stdout], [], [], seconds)
            answer = self._process.stdout.readline() if ready else ""
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise PeerFailed(f"no answer within {seconds:g} s, or the process ended:\n{self._last_words()}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found = json.loads(answer)
        if "failed" in found:
            raise PeerFailed(f"{found['failed']}\n{self._last_words()}")
        return found["found"]

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-LAST_WORDS:]


@contextmanager
def running(
    command: Sequence[str], setup: Setup, log: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[PeerProcess]:
    """Run a peer's script from this directory by an interpreter and arguments, and end it with its child processes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= OFFLINE | {"OMP_NUM_THREADS": str(setup.threads)} | dict(variables)
    interpreter, script, *arguments = command
    with log.open("w") as errors:
        process = subprocess.Popen(
            [interpreter, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
    try:
        yield PeerProcess(process, log, setup)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
