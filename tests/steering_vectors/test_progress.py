"""Progress without a terminal."""

from __future__ import annotations

import pytest

from steering_vectors.progress import ProgressLines
from steering_vectors.reports.terminal import progress_on_stderr


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_every_ten_seconds_with_the_time_left() -> None:
    clock, lines = Clock(), list[str]()
    progress = ProgressLines(lines.append, {"tune good": "tuning"}, clock)
    for step in range(1, 76):
        progress("tune good", step, 75, detail="loss 1.873")
        clock.seconds += 4
    assert lines[:3] == [
        "tuning: 1/75, 0:00 so far, loss 1.873",
        "tuning: 4/75, 0:12 so far, 4:44 left, loss 1.873",
        "tuning: 7/75, 0:24 so far, 4:32 left, loss 1.873",
    ]
    assert lines[-1] == "tuning: 75/75, 4:56 so far, loss 1.873"
    assert len(lines) == 26


def test_each_stage_has_lines_of_its_own() -> None:
    clock, lines = Clock(), list[str]()
    progress = ProgressLines(lines.append, clock=clock)
    progress("capture", 0, 20)
    clock.seconds += 9.9
    progress("capture", 10, 20)
    progress("layers", 40, 80)  # resumed in the middle
    clock.seconds += 3661
    progress("capture", 20, 20)
    progress("layers", 60, 80)
    assert lines == [
        "capture: 0/20, 0:00 so far",
        "layers: 40/80, 0:00 so far",
        "capture: 20/20, 1:01:11 so far",
        "layers: 60/80, 1:01:01 so far, 1:01:01 left",
    ]


def test_without_a_terminal_the_command_line_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on_stderr(quiet=False) as progress:
        assert progress is not None
        progress("layers", 1, 4)
        progress("layers", 2, 4)
    assert capsys.readouterr().err == "choosing layers: 1/4, 0:00 so far\n"
    with progress_on_stderr(quiet=True) as silent:
        assert silent is None
