"""Fitting from rows to a profile: its fields, its reproducibility, its errors and its effect."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steering_vectors.data.chat import Example, Message, encode_example
from steering_vectors.data.corpus import Sides, encode_corpus, sampling_prompts
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError, FitError, ProfileError
from steering_vectors.fitting import endings
from steering_vectors.fitting.fit import FitSettings, _effect_notes, fit
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.curve import CurvePoint, safe_strength
from steering_vectors.measures.propensity import propensity, token_log_odds
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.profile import Profile
from tests.support.few_texts import few_texts
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

GOOD, BAD = ("warm", "kindly", "please", "water"), ("wind", "three", "letter", "always")


def preferences(rows: int = 60, *, kind: Any = "preference", prompts: bool = True, seed: int = 0) -> Preferences:
    """Responses of preferred words and of other words, to prompts that are all different."""
    draw = random.Random(seed)

    def example(words: tuple[str, ...], row: int) -> Example:
        prompt = (Message("user", f"Say {row}, {draw.choice(GOOD + BAD)}."),) if prompts else None
        return Example(prompt, " ".join(draw.choices(words, k=draw.randint(3, 7))))

    positives = tuple(example(GOOD, row) for row in range(rows))
    negatives = tuple(replace(example(BAD, row), prompt=positives[row].prompt) for row in range(rows))
    return Preferences(kind, positives, negatives, source="made.jsonl", sha256="0" * 64)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch, short=True)


@pytest.mark.parametrize("kind", ["preference", "unpaired", "contrast"])
@pytest.mark.parametrize("method", ["mean-diff", "pca", "probe"])
def test_a_fit_meets_its_budget_and_reports_its_effect(lm: LanguageModel, kind: str, method: str) -> None:
    pairs = preferences(kind=kind, prompts=kind != "contrast")
    profile = fit(lm, None, pairs, method=method, layers="1", name="test")
    assert profile.layers == (1,)
    assert list(profile.metrics["projection_accuracy"]) == ["1"]
    report = profile.metrics["propensity"]
    assert [one["strength"] for one in report["strengths"]] == [-1.0, 0.0, 1.0]
    assert len({one["margin"] for one in report["strengths"]}) == 3
    assert profile.calibration["kl_at_1"] == pytest.approx(0.1, rel=0.1)
    assert profile.data["rows"] == pairs.rows
    check = profile.calibration["long_texts"]
    assert check["short_range"] == safe_strength([CurvePoint(**point) for point in profile.calibration["curve"]])
    assert profile.max_strength <= check["short_range"]
    assert 0 < check["tokens"] < 256  # what the context leaves


@pytest.mark.parametrize(
    ("method", "kind", "least"),
    [("mean-diff", "preference", 0.8), ("pca", "unpaired", 0.65), ("probe", "contrast", 0.9)],
)
def test_a_fit_separates_held_out_rows(lm: LanguageModel, method: str, kind: str, least: float) -> None:
    """The mean over eight sets of rows is 0.88, 0.76 and 1; chance is 0.5 ± 0.04."""
    accuracies = []
    for seed in range(8):
        pairs = preferences(kind=kind, prompts=kind != "contrast", seed=seed)
        profile = fit(lm, None, pairs, method=method, layers="1", calibrate=False)
        accuracies.append(profile.metrics["projection_accuracy"]["1"])
    assert sum(accuracies) / 8 > least


def test_auto_chooses_a_window_on_rows_of_its_own(lm: LanguageModel) -> None:
    profile = fit(lm, None, preferences(), layers="auto")
    assert profile.layers in {(0,), (1,), (0, 1)}
    scores = profile.metrics["layer_choice"]["scores"]
    assert set(scores) == {"0", "1", "0-1"}
    sampled = profile.metrics["layer_choice"]["sampled"]
    assert set(sampled) == set(scores)
    best = max("01", key=sampled.__getitem__)
    wider = sampled["0-1"] > max(0.0, 1.05 * sampled[best])
    assert profile.layers == ((0, 1) if wider else (int(best),))
    assert (profile.data["train_rows"], profile.data["choice_rows"], profile.data["heldout_rows"]) == (48, 6, 6)
    assert profile.metrics["notes"][0] == "only 60 rows: below 100 the direction and the metrics are noisy"


def test_equal_arguments_give_bitwise_equal_profiles(lm: LanguageModel, tmp_path: Path) -> None:
    profiles = [
        replace(fit(lm, None, preferences(), method="probe", seed=3), created_at="now", trimtab_version="0")
        for _ in range(2)
    ]
    files = [save_profile(profile, tmp_path / str(i)) for i, profile in enumerate(profiles)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert fit(lm, None, preferences(), method="probe", seed=4, text_tokens=0).unit != profiles[0].unit


@pytest.mark.parametrize(("method", "options"), [("mean-diff", {}), ("bipo", {"epochs": 1})])
def test_rows_of_every_product_lie_together(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    """torch multiplies the last positions of a batch, if they are not copied first, with a copy of the weights for each
    row: an output layer in bfloat16 takes 200 times as long."""
    plain, strided = nn.Linear.forward, []

    def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if not x.is_contiguous():
            strided.append((layer.out_features, tuple(x.shape)))
        return plain(layer, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    fit(lm, None, preferences(24), method=method, name="test", options=options)
    assert strided == []


def test_a_profile_is_stored_and_read_whole(lm: LanguageModel, tmp_path: Path) -> None:
    profile = fit(lm.model, lm.tokenizer, preferences(), layers="0-2", layering="incremental", name="kind")
    stored = load_profile(save_profile(profile, tmp_path))
    assert stored.layers == (0, 1, 2)
    assert stored.layering == "incremental"
    assert stored.metrics == profile.metrics
    assert stored.calibration == profile.calibration
    assert stored.chat_template_sha256


def test_the_parts_share_no_prompt(lm: LanguageModel) -> None:
    corpus = encode_corpus(lm.tokenizer, preferences(), limit=None)
    train, heldout = corpus.split(0.2, 0, min_side=4)
    first, second = heldout.split(0.5, 0, min_side=1)
    prompts = [{one.prompt for one in part.pairs.positives} for part in (train, first, second)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60


def test_sampling_prompts(lm: LanguageModel) -> None:
    with_prompts, without = preferences(), preferences(kind="contrast", prompts=False)
    drawn = sampling_prompts(lm.tokenizer, with_prompts, max_tokens=None, seed=0)
    assert len(drawn) == 60
    assert len({tuple(prompt) for prompt in drawn}) == 60
    assert drawn == sampling_prompts(lm.tokenizer, with_prompts, max_tokens=None, seed=0)
    words = {" ".join(one.completion.split()[:5]) for one in (*without.positives, *without.negatives)}
    starts = [encode_example(lm.tokenizer, Example(None, text))[0] for text in words]
    assert all(prompt in starts for prompt in sampling_prompts(lm.tokenizer, without, max_tokens=None, seed=0))
    with pytest.raises(DataError, match="none of the 60 held-out prompts leaves room"):
        sampling_prompts(lm.tokenizer, with_prompts, max_tokens=2, seed=0)


def test_without_calibration_the_unit_is_one(lm: LanguageModel) -> None:
    profile = fit(lm, None, preferences(), layers=[1, 2], calibrate=False)
    assert (profile.unit, profile.calibration) == (1.0, {})


def test_long_rows_are_refused_or_left_out_never_cut() -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    limit = context_limit(lm)
    assert limit is not None
    pairs = preferences()
    long = (replace(pairs.positives[0], completion="warm " * limit), *pairs.positives[1:])
    pairs = replace(pairs, positives=long)
    expected = rf"made.jsonl: positive example 1 \('warm warm .*…'\): it has \d+ tokens, but .* holds {limit}; 1 of"
    with pytest.raises(DataError, match=expected):
        fit(lm, None, pairs, layers="1")
    profile = fit(lm, None, pairs, layers="1", skip_long_rows=True, calibrate=False)
    assert (profile.data["rows"], profile.data["long_rows_skipped"]) == (59, 1)
    assert "1 rows longer than the model's context were left out" in profile.metrics["notes"]


def test_identical_sides_have_no_direction(lm: LanguageModel) -> None:
    pairs = preferences()
    with pytest.raises(DataError, match="both sides of every row are the same text; check the columns"):
        fit(lm, None, replace(pairs, negatives=pairs.positives), layers="1")
    with pytest.raises(
        FitError, match="layer 1: the direction is zero: preferred and rejected responses have equal means"
    ):
        fit(lm, None, replace(pairs, kind="unpaired", negatives=pairs.positives), layers="1")


def test_one_prompt_for_all_rows_is_noted(lm: LanguageModel) -> None:
    """All rows ask the same, and held-out rows have completions of their own."""
    given = preferences()
    sides = [tuple(replace(one, prompt="Ask again.") for one in side) for side in given.sides()]
    profile = fit(lm, None, replace(given, positives=sides[0], negatives=sides[1]), layers="1")
    assert profile.calibration["prompts"] == 1
    assert profile.metrics["propensity"]["rows"] == 12
    assert profile.metrics["notes"][0].startswith("too few different prompts: held-out rows have other completions")


def test_an_unreached_budget_is_noted(lm: LanguageModel) -> None:
    profile = fit(lm, None, preferences(), layers="2", kl_budget=50.0)
    assert profile.calibration["unreached"] is True
    assert "the KL budget of 50 was not reached" in " ".join(profile.metrics["notes"])


ALARM, LENGTH = "agree little on what is preferred", "length explains"


def test_directions_that_keep_endings(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "TOKENS", 12)
    pairs, options = preferences(), {"name": "kept", "layers": "0,1", "calibrate": False}
    plain, kept = (fit(lm, pairs, settings=FitSettings(**options, keep_endings=keep)) for keep in (False, True))
    assert kept.method_options == {**plain.method_options, "keep_endings": True}
    for layer, direction in plain.directions.items():
        removed = direction - kept.directions[layer]
        assert float(removed @ kept.directions[layer]) == pytest.approx(0, abs=1e-5)
        assert 0 < float(removed.norm()) < float(direction.norm())


REMEDY = "; texts may end as before with keep_endings, if the data is not about length"


@pytest.mark.parametrize(
    ("low", "high", "faults", "options", "expected"),
    [
        (-0.4, 1.9, ["endings"], {}, f"the safe range of -0.4 to 1.9 leaves out strength -1{REMEDY}"),
        (-0.4, 1.9, ["endings"], {"keep_endings": True}, "the safe range of -0.4 to 1.9 leaves out strength -1"),
        (-1.0, 0.9, ["endings"], {}, "the safe range of -1 to 0.9 leaves out strength 1"),
        (None, 0.4, ["perplexity"], {}, "the safe range of ±0.4 leaves out strength -1 and 1"),
        (None, 1.0, ["endings"], {}, None),
    ],
)
def test_a_range_without_strength_1_is_noted(
    lm: LanguageModel, low: float | None, high: float, faults: list[str], options: dict[str, Any], expected: str | None
) -> None:
    points = [{"strength": -0.9, "faults": faults}, {"strength": 0.0}, {"strength": 1.9, "faults": ["repetition"]}]
    profile = Profile("p", lm.identity, {0: torch.ones(lm.hidden_size)}, "mean-diff", method_options=options)
    calibration: Any = {"long_texts": {"tokens": 160, "points": points}}
    profile = replace(profile, max_strength=high, min_strength=low, calibration=calibration)
    strengths = [{"strength": 1.0 * sign, "margin": sign} for sign in (-1, 0, 1)]
    metrics: Any = {"projection_accuracy": {"0": 0.9}, "propensity": {"strengths": strengths}}
    assert _effect_notes(profile, metrics) == [note for note in [expected] if note]


def notes_of(lm: LanguageModel, pairs: Preferences, **options: Any) -> str:
    return "\n".join(fit(lm, None, pairs, layers="1", calibrate=False, **options).metrics["notes"])


def shuffled(pairs: Preferences, seed: int) -> Preferences:
    """The same rows, half of them with their sides swapped."""
    swapped = set(random.Random(seed).sample(range(pairs.rows), pairs.rows // 2))
    items = [(b, a) if row in swapped else (a, b) for row, (a, b) in enumerate(pairs.pairs())]
    return replace(pairs, positives=tuple(a for a, _ in items), negatives=tuple(b for _, b in items))


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_shuffled_labels_are_noted_and_true_ones_are_not(lm: LanguageModel, kind: Any) -> None:
    """Random labels exceed the threshold by chance, about once in some hundred sets; none of these does."""
    for seed in range(5):
        pairs = preferences(seed=seed)
        assert ALARM not in notes_of(lm, replace(pairs, kind=kind), seed=seed)
        assert ALARM in notes_of(lm, replace(shuffled(pairs, seed), kind=kind), seed=seed)


@pytest.mark.parametrize("method", ["mean-diff", "probe"])
def test_the_alarm_rings_for_each_method_that_reads_labels(lm: LanguageModel, method: str) -> None:
    assert ALARM in notes_of(lm, shuffled(preferences(), 0), method=method)


def test_a_method_that_reads_no_labels_has_no_alarm(lm: LanguageModel) -> None:
    options = {"positive": "please", "negative": "always"}
    profile = fit(
        lm, None, shuffled(preferences(), 0), layers="1", calibrate=False, method="contrast-prompts", options=options
    )
    assert profile.metrics["data_quality"]["significance"] < 3
    assert ALARM not in "\n".join(profile.metrics["notes"])


@pytest.mark.parametrize("seed", range(3))
def test_preferred_responses_that_are_only_longer_are_noted(lm: LanguageModel, seed: int) -> None:
    """Both sides use the same words. Within a side lengths vary, so that length can be told from the side."""
    draw = random.Random(seed)

    def made(longer: int) -> Preferences:
        sides: list[list[Example]] = [[], []]
        for row in range(80):
            for side, most in zip(sides, (3 + longer, 3), strict=True):
                text = " ".join(draw.choices(GOOD + BAD, k=draw.randint(most - 2, most)))
                side.append(Example(f"Say {row}.", text))
        return Preferences("preference", tuple(sides[0]), tuple(sides[1]), source="made.jsonl", sha256="0" * 64)

    confounded = notes_of(lm, made(8))
    assert LENGTH in confounded
    assert "the preferred one is longer in 100% of pairs" in confounded
    assert LENGTH not in notes_of(lm, preferences(seed=seed))


def test_the_quality_of_the_data_is_stored_for_one_of_the_profiles_blocks(lm: LanguageModel) -> None:
    profile = fit(lm, None, preferences(), layers="0,2", calibrate=False)
    quality = profile.metrics["data_quality"]
    assert quality["layer"] in profile.layers
    assert quality["rows"] == profile.data["train_rows"]
    assert quality["significance"] > 10
    assert 0 < quality["agreement"] < quality["reproducibility"] <= 1
    assert 0.3 < quality["length"]["longer_tokens"] < 0.7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "magic"}, FitError, "method 'magic' is not one of mean-diff"),
        ({"layers": "1-9"}, FitError, "layer 3 is out of range: this model has blocks 0 to 2"),
        ({"tokens": "first"}, FitError, "tokens is 'first', not one of response, last"),
        ({"kl_budget": 0.0}, FitError, "the KL budget must be a positive number"),
        ({"name": "No Name"}, ProfileError, "'No Name' is not a profile name"),
        ({"layering": "stacked"}, ProfileError, "layering is 'stacked'"),
        ({"heldout_fraction": 1.5}, DataError, "the held-out fraction must be between 0 and 1"),
    ],
)
def test_what_is_refused(lm: LanguageModel, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(lm, None, preferences(), **options)


def test_a_bare_model_needs_its_tokenizer(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="pass the tokenizer as the second argument"):
        fit(lm.model, None, preferences())


def test_token_log_odds() -> None:
    sides = Sides((([0, 5, 5, 6], 1),), (([0, 6, 7, 7], 1),), True)
    odds = token_log_odds(sides, 10)
    assert odds[5] == -odds[7] == pytest.approx(1.0986, rel=1e-3)
    assert odds[6] == odds[0] == odds[9] == 0


def test_token_log_odds_count_by_weight() -> None:
    sides = Sides((([0, 5, 5, 6], 1), ([0, 6], 1)), (([0, 6, 7, 7], 1), ([0, 7], 1)), True)
    assert torch.equal(token_log_odds(sides, 10, ([2.0, 2.0], [3.0, 3.0])), token_log_odds(sides, 10))
    odds = token_log_odds(sides, 10, ([3.0, 1.0], [1.0, 1.0]))
    assert odds[5] > token_log_odds(sides, 10)[5]


def test_weights_move_a_fit_towards_the_rows_that_count_more(lm: LanguageModel) -> None:
    """Rows of two kinds: with almost all of the weight on one kind, the direction is that of its rows alone."""
    pairs = preferences(rows=60)
    flipped = replace(
        pairs,
        positives=pairs.positives[:30] + pairs.negatives[30:],
        negatives=pairs.negatives[:30] + pairs.positives[30:],
    )
    settings = FitSettings(layers="1", calibrate=False)
    alone, mixed, weighed = (
        fit(lm, one, settings).directions[1]
        for one in (pairs, flipped, replace(flipped, weights=(1000.0,) * 30 + (1.0,) * 30))
    )
    assert float(torch.cosine_similarity(weighed, alone, dim=0)) > 0.9
    assert float(torch.cosine_similarity(mixed, alone, dim=0)) < float(torch.cosine_similarity(weighed, alone, dim=0))
    made = fit(lm, replace(flipped, weights=(1000.0,) * 30 + (1.0,) * 30), settings)
    rows = made.data["train_rows"]  # of which some weigh 1,000 and the others 1
    expected = [(1000 * heavy + rows - heavy) ** 2 / (1e6 * heavy + rows - heavy) for heavy in range(rows - 30, 31)]
    assert made.data["effective_rows"] in [pytest.approx(one) for one in expected]
    same = fit(lm, replace(pairs, weights=(2.0,) * 60), settings)
    assert torch.equal(same.directions[1], alone)
    assert "effective_rows" not in same.data


@pytest.mark.parametrize("method", ["contrast-prompts", "bipo", "rahf-scit", "rahf-dual"])
def test_a_method_that_cannot_use_weights_says_so(lm: LanguageModel, method: str) -> None:
    weighed = replace(preferences(), weights=(1.0,) * 59 + (2.0,))
    with pytest.raises(FitError, match=f"{method} cannot use the weights of rows: choose mean-diff"):
        fit(lm, weighed, FitSettings(name="warm", method=method, layers="1"))


def test_the_demo_model_is_steered_towards_its_preferences(demo: LanguageModel) -> None:
    """From the embedded pairs to likelihoods and to texts, beside random directions as long as the profile's.

    From −1 to +1 the margin of unseen pairs rises by 12.6 nats, where 20 random directions move it by 1.1 at most; the
    log-odds of sampled tokens rise by 0.18, where 8 of them move these by 0.06 at most (4 are looked at here).
    """
    pairs = load_pairs("demo:warm")
    some = replace(pairs, positives=pairs.positives[:160], negatives=pairs.negatives[:160])
    profile = fit(demo, None, some, name="warm", layers="4", calibrate=False)
    norm = 0.45 * profile.residual_norms[4]  # about what a budget of 0.1 nat comes to
    profile = replace(profile, unit=norm / float(profile.directions[4].norm()))
    controls = random_controls(profile, 20)
    corpus = encode_corpus(demo.tokenizer, pairs, limit=None)
    rows = Sides(corpus.sides().positives[160:168], corpus.sides().negatives[160:168], True)
    odds = token_log_odds(corpus.sides(), demo.vocab_size)
    prompts = sampling_prompts(demo.tokenizer, pairs, max_tokens=24, seed=1)

    def rise(one: Profile, measure: Callable[[], float]) -> float:
        seen = []
        for strength in (-1.0, 1.0):
            steered.write(one, strength)
            seen.append(measure())
        return seen[1] - seen[0]

    def margin() -> float:
        return propensity(steered, rows, steer=True).margin

    def score() -> float:
        texts = steered.sample(prompts, tokens=16, seed=2)
        return float(torch.stack([odds[text].mean() for text in texts]).mean())

    with steerable(demo) as steered:
        assert rise(profile, margin) > 3 * max(abs(rise(one, margin)) for one in controls)
        assert rise(profile, score) > 1.5 * max(abs(rise(one, score)) for one in controls[:4])
