"""`trimtab refine --signals` on the demo model: what people did makes votes, which held-out ones agree with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.learning.crowd import Crowd, Seen, shared_out
from server.cli import app
from server.feedback.trl import Exported, raw_rows
from steering_vectors.data.sources import DEMO_DIRECTORY, load_pairs
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import save_profile
from tests.support.few_texts import few_texts

pytestmark = pytest.mark.slow


def rows_of(manner: str, count: int) -> list[dict[str, Any]]:
    lines = (DEMO_DIRECTORY / f"{manner}.train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def test_signals_make_votes_that_a_profile_is_fitted_to(
    demo: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_texts(monkeypatch)
    base, feedback, profiles = tmp_path / "base.jsonl", tmp_path / "feedback.jsonl", tmp_path / "profiles"
    base.write_text("".join(json.dumps(row) + "\n" for row in rows_of("warm", 48)))
    profiles.mkdir()
    save_profile(fit(demo, load_pairs(base), FitSettings(name="warm", layers="4", text_tokens=0)), profiles)
    seen = [
        Seen(row["prompt"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows_of("concise", 90)
    ]
    crowd = Crowd(0)
    given = [one for user, own in shared_out(seen, 10).items() for one in crowd.signals(user, own, judged=0.2)]
    feedback.write_text("".join(json.dumps(row) + "\n" for row in raw_rows(given, Exported())))
    words = (
        "refine", "warm", "--model", "demo", "--data", str(base), "--feedback-file", str(feedback), "--every-vote",
        "--signals", "--layers", "4", "--text-tokens", "0", "--trust", "", "--profiles", str(profiles),
    )  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    behaviour = report["behaviour"]
    assert behaviour["behaviours"] > 170
    assert behaviour["signal_votes"] > 50
    assert 0 < behaviour["judgements"] < 30
    assert behaviour["log_odds"]["copied"][0] > 0 > behaviour["log_odds"]["regenerated"][0]
    (line,) = _audit(profiles)
    assert {name: tuple(pair) for name, pair in line["figures"]["log_odds"].items()} == {
        name: tuple(pair) for name, pair in behaviour["log_odds"].items()
    }
    assert report["gain"]["value"] > 0, (report["gain"], report["reason"])


def _audit(profiles: Path) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["history", "warm", "--profiles", str(profiles), "--json"], catch_exceptions=False)
    changes: list[dict[str, Any]] = json.loads(done.stdout)["changes"]
    return changes
