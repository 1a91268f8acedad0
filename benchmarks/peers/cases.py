"""The cases of the comparison, the peers of each case, and the paired measurement of one peer against trimtab."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import typer

from benchmarks.peers.commands import typical
from benchmarks.peers.process import PeerFailed, PeerProcess
from benchmarks.peers.report import Outcome

DECODE = ("B1P32", "B4P32", "B16P32", "B1P512", "B8P512", "B16P512")
PREFILL = "prefill"
STEERED = "steered"
SPARE = 8  # unmeasured tokens, because rows do not all begin in the same step
CHECKED = (8, 32, 8)  # rows, context, tokens
MIN_AGREEMENT = 0.8  # share of tokens; with a wrong rotary base it is 0.67
MIN_AGREEMENT_CODES = 0.7  # llama.cpp rounds activations to 8 bits in products over codes


@dataclass(frozen=True, slots=True)
class Case:
    """A case of the comparison. `command` is a method of `commands.Peer`."""

    name: str
    command: str
    rows: int
    context: int

    @property
    def unit(self) -> str:
        return "ms" if self.command == "decode" else "tok/s"

    def length(self, steps: int) -> int:
        """The number of tokens of the longest sequence."""
        return self.context + (1 if self.command == "prefill" else steps + SPARE)


def case_of(name: str) -> Case:
    """Parse `prefill`, `steered`, or rows and context such as B16P512."""
    if name == PREFILL:
        return Case(name, "prefill", 16, 512)
    if name == STEERED:
        return Case(name, "steered", 16, 32)
    if (found := re.fullmatch(r"B([1-9]\d*)P([1-9]\d*)", name)) is None:
        raise typer.BadParameter(f"{name!r} is not a case: use prefill, steered, or rows and context as in B16P512")
    return Case(name, "decode", int(found[1]), int(found[2]))


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer: its script, its environment (None for ours) and its commands."""

    script: str
    venv: str | None = None
    arguments: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("tokens", "decode", "prefill")

    def command(self, python: Path) -> tuple[str, ...]:
        return (str(python), self.script, *self.arguments)


OURS = Kind("trimtab_peer.py", commands=("tokens", "decode", "prefill", "steered"))
KINDS = {
    "llama": Kind("llama_cpp_peer.py", "llama"),
    "vllm": Kind("vllm_peer.py", "vllm"),
    "generate": Kind("transformers_peer.py"),
    "continuous": Kind("transformers_peer.py", arguments=("continuous",)),
    "repeng": Kind("steering_libraries.py", "repeng", ("repeng",), ("tokens", "steered")),
    "steering-vectors": Kind("steering_libraries.py", "steering-vectors", ("steering-vectors",), ("tokens", "steered")),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """trimtab and one peer, both loaded."""

    peer: str
    ours: PeerProcess
    theirs: PeerProcess
    steps: int
    least: float = MIN_AGREEMENT

    def agreement(self) -> float:
        """The share of unsteered tokens, each after the same ids, on which both sides agree. Raises PeerFailed below
        `least`, because then the sides do not run the same model. Real weights continue a text: after random ids their
        logits are so close together that two roundings to bfloat16 agree on 70 to 80 % only."""
        rows, context, new = CHECKED
        sides = (self.ours, self.theirs)
        found = [side.ask("tokens", rows=rows, context=context, new=new, seed=0, text=True) for side in sides]
        agreed = sum(_common(one, other) for one, other in zip(*found, strict=True))
        share = agreed / (rows * new)
        if share < self.least:
            raise PeerFailed(f"only {share:.0%} of its tokens agree, below {self.least:.0%}: it runs another model")
        return share

    def measure(self, case: Case, pairs: int) -> Outcome:
        """Measure pairs of alternating order, after one that warms up. Each pair has new prompts."""
        taken: list[tuple[float, float]] = []
        for seed in range(pairs + 1):
            sides = (self.ours, self.theirs) if seed % 2 else (self.theirs, self.ours)
            found = {id(side): self._one(side, case, seed) for side in sides}
            taken.append((found[id(self.ours)], found[id(self.theirs)]))
        ours, theirs = zip(*taken[1:], strict=True)
        return Outcome(self.peer, case.name, case.unit, ours, theirs)

    def _one(self, side: PeerProcess, case: Case, seed: int) -> float:
        """Milliseconds of the median step, or tokens per second."""
        new = {"prefill": 1, "steered": self.steps, "decode": self.steps + SPARE}[case.command]
        found = side.ask(case.command, rows=case.rows, context=case.context, new=new, seed=seed)
        if case.command != "decode":
            return float(case.rows * (case.context if case.command == "prefill" else new) / found)
        if len(found) < self.steps // 2:
            raise PeerFailed(f"only {len(found)} steps gave every row a token, of {self.steps}")
        return typical(found[: self.steps])


def _common(one: list[int], other: list[int]) -> int:
    """The number of tokens before the first difference, after which the sides continue different texts."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
