"""The command loop in a peer's process, with one JSON object per line for each command and each result.

This file uses only the standard library, because every peer's script imports it in an environment without the project.
A peer's own output goes to stderr. Prompts are drawn from a seed, so all peers get the same ones.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
FIRST_ID = 3


@dataclass(frozen=True, slots=True)
class Setup:
    """What to load: `model` is a directory in transformers' format, `gguf` a file with the same weights. At most `rows`
    sequences of `length` tokens run at once. `steered` steers every block, as far as the peer can. trimtab computes in
    bfloat16, or, if `served`, as its server does by default. With `codes` it computes from the file's codes. `text` are
    ids of a text that the model can read, if there is one.
    """

    model: str
    gguf: str
    vocabulary: int
    threads: int
    rows: int
    length: int
    steered: bool
    served: bool = False
    codes: bool = False
    text: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """`rows` prompts of `context` ids, each continued by `new` tokens: excerpts of a text, or random ids. Different
    batches of random ids share no prompt prefix, so prefix caches have no effect."""

    rows: int
    context: int
    new: int
    seed: int
    vocabulary: int
    text: Sequence[int] = ()

    @property
    def prompts(self) -> list[list[int]]:
        if self.text:
            return [list(self.text[row * self.context :][: self.context]) for row in range(self.rows)]
        draw = random.Random(f"{self.seed} {self.rows} {self.context} {self.new}")
        return [[draw.randrange(FIRST_ID, self.vocabulary) for _ in range(self.context)] for _ in range(self.rows)]


class Peer(Protocol):
    """A loaded peer with greedy sampling. `decode` returns the seconds of each step that only adds a token to every
    row, `prefill` the seconds until every row has its first token, `steered` the seconds for all rows, each steered
    differently, and `tokens` the unsteered tokens."""

    version: str

    def decode(self, batch: Batch) -> list[float]: ...

    def prefill(self, batch: Batch) -> float: ...

    def tokens(self, batch: Batch) -> list[list[int]]: ...

    def steered(self, batch: Batch) -> float: ...


def serve(load: Callable[[Setup], Any]) -> None:
    """Load the peer described by the first line, then run commands until the input ends."""
    ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer: Any = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            if peer is None:
                peer = load(Setup(**asked))
                found = peer.version
            else:
                found = getattr(peer, asked.pop("command"))(Batch(**asked))
            answer = {"found": found}
        except Exception:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # do not wait for the peer's threads


def steps_between(stamps: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between tokens while all rows generate. `stamps[row]` are the times of a row's tokens."""
    began, ended = max(row[0] for row in stamps), min(row[-1] for row in stamps)
    latest = [stamp for stamp in max(stamps, key=lambda row: row[0]) if began <= stamp <= ended]
    return [after - before for before, after in itertools.pairwise(latest)]


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def typical(steps: Sequence[float]) -> float:
    """Milliseconds of the median step."""
    return 1e3 * median(steps)
