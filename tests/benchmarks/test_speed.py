"""The benchmarks of speed: which side is first, what each pair is given, and what makes a comparison fail."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.common.decode_steps import Step
from benchmarks.peers.cases import Comparison, case_of
from benchmarks.peers.commands import Setup
from benchmarks.peers.process import PeerFailed, running
from benchmarks.peers.report import Outcome
from benchmarks.speed import first_requests, scoring, throughput
from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

SETUP = Setup("model", "gguf", vocabulary=100, threads=1, rows=16, length=64, steered=False)
# A peer that notes what it is asked. `wrong`: how many of its eight rows begin with another token.
SCRIPT = """
import sys
sys.path.append({benchmarks!r})
from commands import serve

name, seconds, wrong, log = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class Peer:
    version = name
    def __init__(self, setup): pass
    def note(self, batch):
        with open(log, "a") as file: print(name, batch.seed, sum(map(sum, batch.prompts)), file=file)
    def tokens(self, batch):
        return [[row < wrong, *range(1, batch.new)] for row in range(batch.rows)]
    def prefill(self, batch): self.note(batch); return seconds * (1 + batch.seed)
    def steered(self, batch): self.note(batch); return seconds
    def decode(self, batch): self.note(batch); return [seconds, seconds, 2 * seconds, 9.0, 9.0, 9.0][:batch.new - 8]

serve(Peer)
"""


class Sides:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def comparison(self, *, wrong: int = 0, steps: int = 3) -> Comparison:
        """Our side takes half a second for what the peer takes two for."""
        script = self._folder / "peer.py"
        script.write_text(SCRIPT.format(benchmarks=str(Path(__file__).parents[2] / "benchmarks" / "peers")))
        ours, theirs = (
            self._stack.enter_context(
                running(
                    (sys.executable, str(script), name, seconds, flips, str(self._folder / "asked")),
                    SETUP,
                    self._folder / f"{name}.log",
                )
            )
            for name, seconds, flips in (("ours", "0.5", "0"), ("theirs", "2", str(wrong)))
        )
        return Comparison("theirs", ours, theirs, steps)

    @property
    def asked(self) -> list[list[str]]:
        return [line.split() for line in (self._folder / "asked").read_text().splitlines()]


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[Sides]:
    with ExitStack() as stack:
        yield Sides(tmp_path, stack)


def test_the_order_alternates_and_every_pair_has_its_prompts(sides: Sides) -> None:
    found = sides.comparison().measure(case_of("prefill"), 2)
    names, seeds, prompts = zip(*sides.asked, strict=True)
    assert names == ("theirs", "ours", "ours", "theirs", "theirs", "ours")
    assert seeds == ("0", "0", "1", "1", "2", "2")
    assert prompts[::2] == prompts[1::2]  # both sides of a pair the same
    assert len(set(prompts)) == 3
    tokens = 16 * 512
    assert found.ours == (tokens / 1.0, tokens / 1.5)  # the first pair, of half a second, is left out
    assert found.theirs == (tokens / 4.0, tokens / 6.0)
    assert found.summary["ratio"] == 4


def test_a_steered_case_counts_written_tokens(sides: Sides) -> None:
    found = sides.comparison(steps=3).measure(case_of("steered"), 1)
    assert (found.ours, found.theirs) == ((16 * 3 / 0.5,), (16 * 3 / 2,))


def test_of_decoding_the_median_of_the_first_steps_counts(sides: Sides) -> None:
    found = sides.comparison(steps=3).measure(case_of("B1P4"), 1)
    assert (found.unit, found.ours, found.theirs) == ("ms", (500.0,), (2000.0,))


def test_too_few_steps_are_no_measurement(sides: Sides) -> None:
    with pytest.raises(PeerFailed, match="only 6 steps"):
        sides.comparison(steps=14).measure(case_of("B1P4"), 1)


@pytest.mark.parametrize(("wrong", "share"), [(0, 1.0), (1, 7 / 8)])
def test_agreement_is_of_tokens_after_the_same_ids(sides: Sides, wrong: int, share: float) -> None:
    assert sides.comparison(wrong=wrong).agreement() == share


def test_another_model_is_not_compared(sides: Sides) -> None:
    with pytest.raises(PeerFailed, match="only 75% of its tokens agree, below 80%"):
        sides.comparison(wrong=2).agreement()


def test_every_median_has_its_range() -> None:
    found = Outcome("peer", "B1P32", "ms", ours=(1.0, 4.0, 9.0), theirs=(2.0, 4.0, 3.0)).summary
    assert (found["ours"], found["ours_range"]) == (4.0, [1.0, 9.0])
    assert (found["theirs"], found["theirs_range"]) == (3.0, [2.0, 4.0])


# Scoring


def test_texts_differ_between_pairs_and_lengths_do_not() -> None:
    one, other = (scoring._texts(50, 20, 8, pair) for pair in (1, 2))
    assert list(map(len, one)) == list(map(len, other))
    assert not any(a == b for a, b in zip(one, other, strict=True))
    assert one == scoring._texts(50, 20, 8, 1)
    assert {4, 8} <= set(map(len, one)) <= set(range(4, 9))


@pytest.mark.parametrize(("pair", "order"), [(0, ["raw", "echo"]), (1, ["echo", "raw"])])
def test_which_side_scores_first_alternates(pair: int, order: list[str]) -> None:
    ran: list[str] = []

    def raw() -> scoring.Scored:
        ran.append("raw")
        return 1.0, []

    def echo() -> scoring.Scored:
        ran.append("echo")
        return 2.0, []

    assert scoring._in_turn(pair, raw, echo) == ((1.0, []), (2.0, []))
    assert ran == order


def test_the_largest_difference_of_two_sides() -> None:
    raw = (1.0, [[-1.0, -2.0], [-3.0]])
    assert scoring.largest_difference((raw, (1.0, [[-1.0, -2.5], [-3.25]]))) == 0.5
    assert scoring.largest_difference((raw, raw)) == 0
    assert math.isnan(scoring.largest_difference((raw, (1.0, [[math.nan, -2.0], [-3.0]]))))
    with pytest.raises(ValueError, match="shorter"):
        scoring.largest_difference((raw, (1.0, [[-1.0], [-3.0]])))


def test_rates_and_ratios_of_scoring() -> None:
    runs = [((2.0, []), (4.0, [])), ((3.0, []), (2.0, [])), ((1.0, []), (1.0, []))]
    found = scoring._figures(120, runs)  # type: ignore[arg-type]
    assert found["raw_tokens_per_second"] == [60, 40, 120]
    assert found["echo_tokens_per_second"] == [30, 60, 120]
    assert (found["ratio"], found["ratio_range"]) == (1.0, [0.5, 1.5])


# Steps


def test_ratios_of_steps_are_within_pairs() -> None:
    found = throughput._compared([(Step(1, 2), Step(2, 2)), (Step(4, 3), Step(4, 6)), (Step(9, 1), Step(3, 1))])
    assert (found["unsteered_ms"], found["steered_ms"]) == (4, 3)
    assert (found["ratio"], found["ratio_range"], found["cpu_ratio"]) == (1.0, [0.5, 3.0], 1.0)
    assert found["pairs_ms"] == [[1, 2], [4, 4], [9, 3]]


def test_the_longest_wait_is_counted_in_steps_of_the_last_round() -> None:
    rounds = [first_requests.Round(longest, middle, 0, 0.0, 0) for longest, middle in ((90.0, 11.0), (15.0, 10.0))]
    assert first_requests.gaps(rounds) == [9.0, 1.5]


def test_no_two_prompts_begin_alike() -> None:
    prompts = [first_requests.prompt_of(row, 8, 200) for row in range(104)]
    assert len({prompt[0] for prompt in prompts}) == 104
    assert all(0 <= token < 200 for prompt in prompts for token in prompt)


def test_each_round_of_first_requests_is_measured() -> None:
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    engine = TorchEngine(language_model, EngineConfig(slots=4, context=64))
    rounds = asyncio.run(first_requests.measured(engine, 2, 3, 8, 5))
    assert len(rounds) == 3
    assert all(one.longest_wait >= one.median_wait > 0 for one in rounds)
    assert all(one.resident > 2**20 for one in rounds)
    assert engine.stats().generated_tokens == 2 * 3 * 5
    assert engine.stats().prompt_tokens == 2 * 3 * 8
