"""The unit meets its KL budget on new texts, measured by code that calibration does not use."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from steering_vectors.data.chat import Example
from steering_vectors.data.corpus import encode_corpus, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import DataError, FitError, ProfileMismatch
from steering_vectors.fitting import calibration
from steering_vectors.fitting.calibration import (
    SAMPLED_TOKENS,
    CalibrationSettings,
    Cost,
    Reached,
    _power,
    calibrate,
    calibrate_on,
    largest_coefficient,
    search,
    trained_and_fresh,
)
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.measures.curve import CurvePoint, curve_record, measure_curve, safe_strength
from steering_vectors.measures.long_texts import measure_long_texts, safe_range
from steering_vectors.measures.propensity import propensity_report
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from tests.support.by_hand import shifted
from tests.support.few_texts import few_texts
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [[0, *range(first, first + 3 + first % 4)] for first in range(20, 52)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def profile_for(lm: LanguageModel, **fields: object) -> Profile:
    draw = torch.Generator().manual_seed(1)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (1, 2)}
    norms = dict.fromkeys(directions, 50.0)
    return replace(Profile("test", lm.identity, directions, "mean-diff", residual_norms=norms), **fields)  # type: ignore[arg-type]


def calibrated(
    lm: LanguageModel,
    profile: Profile,
    prompts: list[list[int]],
    *,
    tokens: int = SAMPLED_TOKENS,
    text_tokens: int = 0,
    progress: Progress | None = None,
    **settings: float,
) -> Profile:
    """`calibrate_on`, without long texts unless asked for."""
    chosen = CalibrationSettings(text_tokens=text_tokens, **settings)  # type: ignore[arg-type]
    return calibrate_on(lm, profile, prompts, chosen, tokens=tokens, progress=progress)


def measured_kl(lm: LanguageModel, profile: Profile, prompts: list[list[int]], tokens: int, seed: int) -> float:
    """Mean KL per token over new samples, one text at a time, with the shift added by plain hooks."""
    shifts = {layer: profile.unit * direction for layer, direction in profile.injected().items()}

    def logs(ids: torch.Tensor) -> torch.Tensor:
        return lm.model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)  # type: ignore[no-any-return]

    draw = torch.Generator().manual_seed(seed)
    total = count = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt] * 8)
            alive = torch.ones(len(ids), dtype=torch.bool)
            for _ in range(tokens):
                base = logs(ids)
                with shifted(lm, shifts, len(prompt) - 1):
                    steered = logs(ids)
                total += float((steered.exp() * (steered - base)).sum(-1)[alive].sum())
                count += int(alive.sum())
                drawn = torch.multinomial(steered.exp(), 1, generator=draw)
                alive &= drawn[:, 0] != lm.tokenizer.eos_token_id
                ids = torch.cat([ids, drawn], dim=1)
    return total / count


@pytest.mark.parametrize("layering", ["independent", "incremental"])
def test_fresh_samples_cost_the_budget(lm: LanguageModel, layering: str) -> None:
    profile = calibrated(lm, profile_for(lm, layering=layering), PROMPTS, kl_budget=0.1, tokens=16, seed=0)
    assert profile.calibration["kl_at_1"] == pytest.approx(0.1, rel=0.05)
    assert profile.calibration["unreached"] is False
    assert measured_kl(lm, profile, PROMPTS[::2], 16, seed=99) == pytest.approx(0.1, rel=0.1)


def test_what_is_recorded(lm: LanguageModel) -> None:
    recorded = calibrated(lm, profile_for(lm), PROMPTS, tokens=8, seed=7).calibration
    assert set(recorded) == {
        "kl_budget", "kl_at_1", "kl_per_character", "unreached", "prompts", "prompts_sha256", "texts", "tokens", "seed",
        "perplexity_bound", "curve",
    }  # fmt: skip
    assert (recorded["prompts"], recorded["texts"], recorded["seed"]) == (32, 192, 7)
    assert 192 <= recorded["tokens"] <= 192 * 8
    assert recorded["prompts_sha256"] == hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert recorded["kl_per_character"] > 0


def test_the_cost_per_character(lm: LanguageModel) -> None:
    """The same nats, over the characters of what was written."""
    texts = [lm.tokenizer.encode(text, add_special_tokens=False) for text in ("warm water", "a pear")]
    tokens = sum(map(len, texts))
    assert Cost.of(lm, 1.7, texts) == Cost(1.7 / tokens, 1.7 / len("warm watera pear"), tokens)
    assert Cost.of(lm, 1.7, [[1]]) == Cost(1.7, None, 1)
    assert Cost.of(lm, 0.0, [[]]) == Cost(0.0, None, 0)


def test_the_recorded_cost_is_that_of_texts_sampled_at_the_unit(lm: LanguageModel) -> None:
    profile = calibrated(lm, profile_for(lm), PROMPTS, kl_budget=1.0, tokens=16, seed=1)
    with steerable(lm) as steered:
        steered.write(profile, 1.0)
        texts = steered.continuations(PROMPTS * 6, tokens=16, seed=1)
        sums, _ = steered.divergences(texts)
    found, recorded = Cost.of(lm, float(sums.sum()), [ids[start:] for ids, start in texts]), profile.calibration
    assert recorded["kl_at_1"] == pytest.approx(found.per_token, rel=1e-4)
    assert recorded["kl_per_character"] == pytest.approx(found.per_character, rel=1e-4)
    assert recorded["tokens"] == found.tokens


@pytest.mark.parametrize(
    ("kl", "power"),
    [
        ({0.5: 0.3}, 2.0),  # one alone says nothing
        ({1.0: 0.1, 2.0: 0.1 * 2**3}, 3.0),
        ({2.0: 0.1 * 2**3, 0.01: 1e-9, 1.0: 0.1}, 3.0),  # the two nearest to the budget
        ({1.0: 0.1, 1.1: 0.5}, 8.0),
        ({1.0: 0.1, 1.1: 0.09}, 2.0),
    ],
)
def test_the_power_by_which_kl_grows(kl: dict[float, float], power: float) -> None:
    assert _power(kl, 0.1) == pytest.approx(power)


def test_it_is_deterministic_and_the_seed_matters(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch)
    first, again, other = (calibrated(lm, profile_for(lm), PROMPTS, tokens=8, seed=seed) for seed in (0, 0, 1))
    assert (first.unit, first.calibration) == (again.unit, again.calibration)
    assert first.unit != other.unit


def test_an_unreachable_budget_stops_at_norm_ratio_one(lm: LanguageModel) -> None:
    profile = profile_for(lm, residual_norms={1: 0.02, 2: 3.0})
    found = calibrated(lm, profile, PROMPTS[:4], kl_budget=5.0, tokens=8)
    assert found.calibration["unreached"] is True
    assert found.calibration["kl_at_1"] < 5.0
    assert found.unit * float(profile.directions[1].norm()) == pytest.approx(0.02)
    assert found.unit == pytest.approx(largest_coefficient(profile))


def test_a_bfloat16_model_calibrates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch)
    lm = wrap_model(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer())
    found = calibrated(lm, profile_for(lm), PROMPTS[:8], kl_budget=0.2, tokens=8)
    assert found.calibration["kl_at_1"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_positive(lm: LanguageModel, budget: float) -> None:
    with pytest.raises(FitError, match="the KL budget must be a positive number of nats per token, not"):
        calibrated(lm, profile_for(lm), PROMPTS, kl_budget=budget)


def test_calibration_needs_prompts_and_residual_norms(lm: LanguageModel) -> None:
    with pytest.raises(FitError, match="there is no prompt to calibrate on"):
        calibrated(lm, profile_for(lm), [])
    with pytest.raises(FitError, match="cannot be calibrated without its residual norms"):
        calibrated(lm, profile_for(lm, residual_norms={}), PROMPTS)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("root", [0.01, 0.3, 9.9])
def test_the_search_finds_the_root_of_any_power(power: float, root: float) -> None:
    calls: list[float] = []

    def kl_at(coefficient: float) -> float:
        calls.append(coefficient)
        return 0.1 * (coefficient / root) ** power

    found = search(kl_at, 10.0, 0.1, start=2.0, tolerance=0.03, evaluations=12)
    assert found.kl == pytest.approx(0.1, rel=0.03)
    assert len(calls) <= 12
    assert not found.unreached


def searched(kl_at: Callable[[float], float], start: float, evaluations: int = 9) -> tuple[Reached, list[float]]:
    """The result of a search for 0.1 up to 10, and the coefficients it tried."""
    tried: list[float] = []

    def noted(coefficient: float) -> float:
        tried.append(coefficient)
        return kl_at(coefficient)

    return search(noted, 10.0, 0.1, start=start, tolerance=0.03, evaluations=evaluations), tried


@pytest.mark.parametrize(
    ("power", "root", "start", "tried"),
    [
        (2, 0.5, 2.0, [2.0, 0.5]),  # KL grows as c²
        (2, 0.01, 2.0, [2.0, 0.2, 0.02, 0.01]),  # at most by a factor of ten
        (2, 9.0, 0.05, [0.05, 0.5, 5.0, 9.0]),
        (2, 9.9, 9.7, [9.7, 9.9]),
        (4, 1.0, 2.0, [2.0, 0.5, 1.0]),  # a straight line in log-log space
        (
            1,
            1.0,
            0.25,
            [0.25, 0.5, 0.5 * 2**0.5, 0.5 * 2**0.75, 0.5 * 2**0.875, 0.5 * 2**0.9375, 0.5 * 2**0.96875],
        ),
    ],
)
def test_the_steps_of_the_search(power: float, root: float, start: float, tried: list[float]) -> None:
    found, coefficients = searched(lambda c: 0.1 * (c / root) ** power, start)
    assert coefficients == pytest.approx(tried)
    assert found == Reached(coefficients[-1], 0.1 * (coefficients[-1] / root) ** power)


def test_a_bracket_is_bisected_where_a_line_would_stay_at_its_end() -> None:
    """KL jumps: the line between the ends predicts a point close to the upper or the lower end."""
    found, tried = searched(lambda c: 1e-12 if c < 1 else 0.11, 0.4, evaluations=3)
    assert tried == pytest.approx([0.4, 4.0, math.sqrt(0.4 * 4.0)])
    assert found == Reached(tried[1], 0.11)
    found, tried = searched(lambda c: 0.09 if c < 1 else 1e12, 0.99, evaluations=3)
    assert tried == pytest.approx([0.99, 0.99 * math.sqrt(0.1 / 0.09), 0.99 * (0.1 / 0.09) ** 0.25])
    assert found == Reached(0.99, 0.09)
    found, tried = searched(lambda c: 0.02 if c < 1 else 0.8, 0.9, evaluations=4)  # the line leads to the middle
    assert tried[1] == pytest.approx(0.9 * math.sqrt(5))
    share = math.log(5) / math.log(40)
    assert tried[2] == pytest.approx(tried[0] * (tried[1] / tried[0]) ** share)
    assert tried[3] == pytest.approx(tried[0] * (tried[2] / tried[0]) ** share)


def test_a_search_that_runs_out_returns_the_closest_point() -> None:
    found, tried = searched(lambda c: 0.05 if c < 1 else 0.19, 0.9, evaluations=2)
    assert found == Reached(tried[1], 0.19)  # a factor of 1.9 is less than one of 2
    found, tried = searched(lambda c: 0.06 if c < 1 else 0.19, 0.9, evaluations=2)
    assert found == Reached(0.9, 0.06)
    assert searched(lambda c: 0.05, 0.9, evaluations=0) == (Reached(10.0, math.inf), [])


def test_a_search_ends_at_the_largest_coefficient() -> None:
    found, tried = searched(lambda c: 1e-3 * c / 10, 5.0)
    assert tried == [5.0, 10.0]
    assert found == Reached(10.0, 1e-3, unreached=True)
    found, tried = searched(lambda c: 0.0, 0.5)
    assert tried == [0.5, 5.0, 10.0]
    assert found == Reached(10.0, 0.0, unreached=True)
    found, tried = searched(lambda c: 0.098, 10.0)
    assert found == Reached(10.0, 0.098)  # within the tolerance


def test_the_largest_coefficient_is_that_of_the_block_with_the_smallest_ratio(lm: LanguageModel) -> None:
    directions = {0: torch.zeros(32), 1: torch.full((32,), 0.5), 2: torch.ones(32)}
    profile = profile_for(lm, directions=directions, residual_norms={1: 8.0, 2: 12.0})
    assert largest_coefficient(profile) == 12.0 / float(torch.ones(32).norm())
    assert largest_coefficient(replace(profile, residual_norms={1: 4.0, 2: 12.0})) == 4.0 / float(directions[1].norm())
    expected = "profile 'test' cannot be calibrated without its residual norms; fit it again"
    for norms in ({1: 8.0}, {1: 8.0, 2: 0.0}):
        with pytest.raises(FitError) as refusal:
            largest_coefficient(replace(profile, residual_norms=norms))
        assert refusal.value.message == expected


@pytest.mark.parametrize("bound", [1.0, 0.5, math.nan, math.inf])
def test_a_perplexity_bound_must_be_above_1(bound: float) -> None:
    expected = f"the perplexity bound must be a factor above 1, not {bound:g}"
    with pytest.raises(FitError) as refusal:
        CalibrationSettings(perplexity_bound=bound)
    assert refusal.value.message == expected


@pytest.mark.parametrize("divergence", [math.inf, math.nan])
def test_logits_that_are_not_finite_are_refused(lm: LanguageModel, divergence: float) -> None:
    with pytest.raises(FitError) as refusal:
        Cost.of(lm, divergence, [[9]])
    assert refusal.value.message == ("the steered model's logits are not finite: load the model with dtype float32")


def test_the_steps_of_a_calibration(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number follows from the public functions for sampling, cost, search and curve."""
    few_texts(monkeypatch)
    profile, rows, calls = profile_for(lm), (PROMPTS[:4] * 3)[:10], list[tuple[str, int, int]]()
    found = calibrated(
        lm, profile, PROMPTS[:4], kl_budget=0.3, perplexity_bound=1.4, tokens=5, seed=3,
        progress=lambda *call: calls.append(call[:3]),
    )  # fmt: skip
    with steerable(lm) as steered:

        def cost(unit: float, prompts: list[list[int]]) -> Cost:
            evaluations.append(unit)
            one = replace(profile, unit=unit)
            steered.write(one, 1.0)
            texts = steered.continuations(prompts, tokens=5, seed=3)
            sums, _ = steered.divergences(texts)
            return Cost.of(lm, float(sums.sum()), [ids[start:] for ids, start in texts])

        evaluations: list[float] = []
        few: dict[float, float] = {}
        largest = largest_coefficient(profile)
        rough = search(
            lambda c: few.setdefault(c, cost(c, rows[:4]).per_token), largest, 0.3,
            start=0.2 * largest, tolerance=0.25, evaluations=10,
        )  # fmt: skip
        power = _power(few, 0.3)
        unit = search(
            lambda c: cost(c, rows).per_token, largest, 0.3,
            start=min(rough.coefficient * (0.3 / rough.kl) ** (1 / power), largest),
            tolerance=0.05, evaluations=4, power=power,
        ).coefficient  # fmt: skip
        evaluated = len(evaluations)
        final = cost(unit, rows)
        curve = measure_curve(steered, replace(profile, unit=unit), rows[:5], bound=1.4, tokens=5, seed=3)
    assert found.unit == pytest.approx(unit, rel=1e-4)
    assert found.max_strength == max(0.1, safe_strength(curve, 1.4))
    assert found.calibration.pop("curve") == [pytest.approx(point, rel=1e-3, abs=1e-5) for point in curve_record(curve)]
    assert found.calibration == {
        "kl_budget": 0.3,
        "kl_at_1": pytest.approx(final.per_token, rel=1e-4),
        "kl_per_character": pytest.approx(final.per_character, rel=1e-4),
        "tokens": final.tokens,
        "prompts": 4,
        "prompts_sha256": hashlib.sha256(json.dumps(PROMPTS[:4]).encode()).hexdigest(),
        "unreached": False,
        "texts": 10,
        "seed": 3,
        "perplexity_bound": 1.4,
    }
    steps = [min(done, 13) for done in range(1, evaluated + 1)]
    assert [call for call in calls if call[0] == "calibrate"] == [("calibrate", done, 14) for done in [*steps, 14]]
    assert {call[0] for call in calls} > {"calibrate"}  # the curve reports too


def test_endings_that_steering_prevents_narrow_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direction makes the end of a text less likely, so texts at the lower end of the range end, and those at the
    upper end do not."""
    few_texts(monkeypatch)
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    (end,) = eos_ids(lm)
    head = lm.model.get_output_embeddings().weight
    with torch.no_grad():
        head[end] *= 4
    profile = profile_for(lm, directions={2: -head[end].detach().clone()})
    found = calibrated(lm, profile, PROMPTS, kl_budget=0.1, perplexity_bound=50, tokens=4, text_tokens=90, seed=1)
    check = found.calibration["long_texts"]
    assert (check["tokens"], check["texts"], check["tells_endings"]) == (90, 16, True)
    assert check["short_range"] == safe_strength(
        [CurvePoint(**point) for point in found.calibration["curve"]], 50
    ) == -found.safe_range[0] > found.max_strength  # fmt: skip
    with steerable(lm) as steered:
        safe, points = safe_range(
            lambda strengths: measure_long_texts(
                steered, found, strengths, PROMPTS[:16], tokens=90, seed=1, compared=4
            ),
            check["short_range"],
            texts=16,
            bound=50,
        )
    assert found.safe_range == (min(safe[0], -0.1), max(safe[1], 0.1))
    assert check["points"] == points
    assert [point["faults"] for point in points if point["strength"] == check["short_range"]] == [["endings"]]


def test_long_texts_fit_the_context(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that leave no room are left out, or else the texts are shorter."""
    few_texts(monkeypatch)
    seen: list[tuple[int, int]] = []

    def noted(
        steered: object, profile: Profile, strengths: list[float], rows: list[list[int]], **options: int
    ) -> object:
        seen.append((max(map(len, rows)), options["tokens"]))
        return measure_long_texts(steered, profile, strengths, rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "measure_long_texts", noted)
    prompts = [PROMPTS[0], [0] * 100]  # of a context of 256
    for wanted, taken, tokens in ((20, 100, 20), (200, len(PROMPTS[0]), 200), (1000, 100, 156)):
        found = calibrated(lm, profile_for(lm), prompts, tokens=4, text_tokens=wanted)
        assert found.calibration["long_texts"]["tokens"] == tokens
        assert set(seen) == {(taken, tokens)}
        seen.clear()


@pytest.mark.parametrize("settings", [CalibrationSettings, FitSettings])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text_tokens": -1}, "text_tokens must be a number of tokens, or 0 for no check of long texts, not -1"),
        ({"text_count": 0}, "text_count must be at least 1, not 0"),
        ({"kl_budget": -0.5}, "the KL budget must be a positive number of nats per token, not -0.5"),
    ],
)
def test_settings_that_cannot_be_used(
    settings: type[CalibrationSettings | FitSettings], values: dict[str, float], expected: str
) -> None:
    with pytest.raises(FitError) as refusal:
        settings(**values)  # type: ignore[arg-type]
    assert refusal.value.message == expected


def test_calibrate_uses_its_settings_and_the_rows_that_are_new(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_texts(monkeypatch)
    pairs = pairs_of(40)
    profile = replace(fit(lm, None, pairs, layers="1", name="kind", calibrate=False), metrics={"notes": ["kept"]})
    settings = CalibrationSettings(kl_budget=0.05, perplexity_bound=1.6, text_tokens=60, text_count=5, seed=5)
    calls: list[str] = []
    found = calibrate(lm, profile, pairs, settings, progress=lambda stage, *_: calls.append(stage))
    _, fresh = trained_and_fresh(profile, encode_corpus(lm.tokenizer, pairs, limit=None))
    prompts = prompts_with_room(lm, fresh.pairs, room=48, seed=5)
    expected = calibrate_on(lm, profile, prompts, settings)
    assert (expected.calibration["long_texts"]["tokens"], expected.calibration["long_texts"]["texts"]) == (60, 5)
    assert found.calibration == expected.calibration
    assert (found.unit, found.max_strength) == (expected.unit, expected.max_strength)
    with steerable(lm) as steered:
        report = propensity_report(steered, expected, fresh.sides())
    assert found.metrics == {"notes": ["kept"], "propensity": report}
    assert "calibrate" in calls


def test_calibrate_leaves_out_long_rows_and_takes_another_model_if_told(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_texts(monkeypatch)
    pairs = pairs_of(24)
    profile = fit(lm, None, pairs, layers="1", name="kind", calibrate=False)
    long = replace(pairs.positives[0], completion="warm " * 300)
    pairs = replace(pairs, positives=(long, *pairs.positives[1:]), sha256="1" * 64)
    with pytest.raises(DataError, match="has 308 tokens, but the model's context holds 256"):
        calibrate(lm, profile, pairs)
    other = replace(lm, identity=replace(lm.identity, fingerprint="0" * 64))
    settings = CalibrationSettings(skip_long_rows=True, allow_model_mismatch=True)
    assert calibrate(other, profile, pairs, settings).calibration["prompts"] == 23


def pairs_of(rows: int, start: int = 0) -> Preferences:
    names = [f"Ask {row}" for row in range(start, start + rows)]
    return Preferences(
        "preference",
        tuple(Example(name, "please, kindly") for name in names),
        tuple(Example(name, "three apples") for name in names),
        sha256=f"{start:064d}",
    )


def test_a_fitted_profile_is_not_calibrated_on_its_own_rows(lm: LanguageModel) -> None:
    own, other = pairs_of(40), pairs_of(40, start=100)
    profile = fit(lm, None, own, layers="1", name="kind", calibrate=False)
    trained, fresh = trained_and_fresh(profile, encode_corpus(lm.tokenizer, own, limit=None))
    assert trained is not None
    assert (trained.pairs.rows, fresh.pairs.rows) == (32, 8)
    encoded = encode_corpus(lm.tokenizer, other, limit=None)
    assert trained_and_fresh(profile, encoded) == (None, encoded)


def test_calibrating_again_meets_another_budget(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch)
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", kl_budget=0.1)
    again = calibrate(lm, profile, pairs_of(40), CalibrationSettings(kl_budget=0.02, perplexity_bound=2.0))
    assert again.calibration["kl_at_1"] == pytest.approx(0.02, rel=0.05)
    assert again.calibration["perplexity_bound"] == 2.0
    assert again.unit < profile.unit
    assert torch.equal(again.directions[1], profile.directions[1])
    assert [one["strength"] for one in again.metrics["propensity"]["strengths"]] == [-1, 0, 1]


def test_another_model_is_refused(lm: LanguageModel) -> None:
    profile = fit(lm, None, pairs_of(40), layers="1", name="kind", calibrate=False)
    other = replace(lm, identity=replace(lm.identity, fingerprint="0" * 64))
    with pytest.raises(ProfileMismatch):
        calibrate(other, profile, pairs_of(40))
