"""Every method finds a planted direction and equals its equation on all activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.errors import FitError
from steering_vectors.measures.activations import LayerStatistics, capture
from steering_vectors.methods import Method, Task, method_named, method_names, register, registry
from steering_vectors.methods.pca import first_component, principal_difference
from steering_vectors.methods.probe import probe_normal
from steering_vectors.methods.registry import option, per_layer
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

HIDDEN = 24
METHODS = ("mean-diff", "pca", "probe")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def statistics_of(positives: torch.Tensor, negatives: torch.Tensor, paired: bool) -> LayerStatistics:
    return LayerStatistics(
        positives.double().mean(0), negatives.double().mean(0), positives, negatives, residual_norm=1.0, paired=paired
    )


def planted(paired: bool, seed: int = 0, rows: int = 400) -> tuple[LayerStatistics, torch.Tensor]:
    """Two clouds that differ along one direction and vary more along another, with the same variation in a pair."""
    draw = torch.Generator().manual_seed(seed)
    direction, distraction = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=draw)).Q.T

    def noise() -> torch.Tensor:
        return 0.3 * torch.randn(rows, HIDDEN, generator=draw)

    def shared() -> torch.Tensor:
        return torch.randn(rows, 1, generator=draw) * distraction

    common = shared()
    positives = common + noise() + 2.0 * direction
    negatives = (common if paired else 0.5 * shared()) + noise() - 1.0 * direction
    return statistics_of(positives, negatives, paired), 3.0 * direction


def find(lm: LanguageModel, method: str, statistics: LayerStatistics) -> torch.Tensor:
    return method_named(method).find(Task(lm, {1: statistics}))[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("paired", [True, False])
def test_each_method_recovers_a_planted_direction(lm: LanguageModel, method: str, paired: bool) -> None:
    for seed in range(8):
        statistics, direction = planted(paired, seed)
        found = find(lm, method, statistics)
        assert found.dtype == torch.float32
        assert float(torch.cosine_similarity(found, direction, dim=0)) > 0.98
        assert float(found.norm()) == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_each_method_recovers_a_direction_planted_in_a_model(lm: LanguageModel, seed: int) -> None:
    """One token stands in every positive response; its embedding is moved far along one axis of the stream."""
    model = tiny_model("llama")
    planted_model = wrap_model(model, tiny_tokenizer())
    draw = torch.Generator().manual_seed(seed)
    axis = torch.nn.functional.normalize(torch.randn(lm.hidden_size, generator=draw), dim=0)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[7] = embeddings[8] + 60 * embeddings.norm(dim=-1).mean() * axis
        for block in planted_model.blocks:
            for parameter in block.parameters():
                parameter.mul_(0.01 if parameter.ndim > 1 else 1)
    positives: list[Encoded] = []
    negatives: list[Encoded] = []
    for _ in range(60):
        ids = torch.randint(20, 380, (6,), generator=draw).tolist()
        positives.append(([*ids, 7], 3))
        negatives.append(([*ids, 8], 3))
    statistics = capture(planted_model, positives, negatives, [0, 2], paired=True)
    for method in METHODS:
        found = method_named(method).find(Task(planted_model, statistics))
        assert sorted(found) == [0, 2]
        for direction in found.values():
            assert float(torch.cosine_similarity(direction, axis, dim=0)) > 0.95


def test_pca_equals_the_singular_vector_of_all_differences() -> None:
    for rows in (10, 400):  # fewer and more rows than dimensions
        statistics, _ = planted(True, seed=1, rows=rows)
        differences = (statistics.positives.double() - statistics.negatives.double()).numpy()
        axis = np.linalg.svd(differences)[2][0]
        delta = differences.mean(0)
        expected = torch.from_numpy((axis @ delta) * axis)
        torch.testing.assert_close(principal_difference(statistics), expected, rtol=1e-5, atol=1e-5)


def test_unpaired_pca_equals_the_singular_vector_of_every_cross_difference() -> None:
    statistics, _ = planted(False, seed=2, rows=40)
    cross = (statistics.positives.double().unsqueeze(1) - statistics.negatives.double()).reshape(-1, HIDDEN).numpy()
    axis = np.linalg.svd(cross, full_matrices=False)[2][0]
    expected = torch.from_numpy((axis @ cross.mean(0)) * axis)
    torch.testing.assert_close(principal_difference(statistics), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_counts_as_repeated_rows(lm: LanguageModel, method: str, paired: bool) -> None:
    draw = torch.Generator().manual_seed(4)
    sides = [torch.randn(60, HIDDEN, generator=draw) + side for side in (0.3, 0.0)]
    counts = torch.randint(1, 4, (60,), generator=draw)
    others = counts if paired else torch.randint(1, 4, (60,), generator=draw)
    repeated = statistics_of(sides[0].repeat_interleave(counts, 0), sides[1].repeat_interleave(others, 0), paired)
    weighed = dataclasses.replace(
        statistics_of(sides[0], sides[1], paired),
        positive_mean=repeated.positive_mean,
        negative_mean=repeated.negative_mean,
        sample_weights=(counts.double(), others.double()),
    )
    found, expected = find(lm, method, weighed), find(lm, method, repeated)
    if method == "probe":  # whose penalty is relative to the number of rows
        assert float(torch.cosine_similarity(found, expected, dim=0)) > 0.999
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = find(lm, method, dataclasses.replace(weighed, sample_weights=None, positive_mean=sides[0].double().mean(0)))
    assert float(torch.cosine_similarity(found, plain, dim=0)) < 0.999


def test_centred_pca_would_lose_the_mean_difference() -> None:
    """This is why the component is not centred."""
    statistics, direction = planted(True)
    differences = statistics.positives.double() - statistics.negatives.double()
    centred = first_component(differences - differences.mean(0))
    unit = direction.double() / direction.norm()
    assert abs(float(centred @ unit)) < 0.5
    assert float(torch.cosine_similarity(principal_difference(statistics), unit, dim=0)) > 0.99


def test_the_principal_difference_takes_its_sign_from_the_labels() -> None:
    statistics, _ = planted(True)
    flipped = statistics_of(statistics.negatives, statistics.positives, True)
    torch.testing.assert_close(principal_difference(flipped), -principal_difference(statistics))


def test_the_probe_equals_a_plain_logistic_regression_by_newton() -> None:
    planted_here, _ = planted(False, seed=5)
    offset = torch.linspace(-9, 9, HIDDEN)  # activations lie far from zero
    statistics = statistics_of(planted_here.positives + offset, planted_here.negatives + offset, False)
    rows = torch.cat([statistics.positives, statistics.negatives]).double()
    labels = torch.cat([torch.ones(len(statistics.positives)), torch.zeros(len(statistics.negatives))]).double()
    centred = rows - rows.mean(0)
    inputs = torch.cat([centred / centred.square().mean().sqrt(), torch.ones(len(rows), 1)], dim=1).double()
    ridge = torch.ones(HIDDEN + 1).double()
    ridge[-1] = 0
    weights = torch.zeros(HIDDEN + 1).double()
    for _ in range(60):
        chance = torch.sigmoid(inputs @ weights)
        gradient = inputs.T @ (chance - labels) + ridge * weights
        curvature = inputs.T @ (inputs * (chance * (1 - chance)).unsqueeze(1)) + torch.diag(ridge)
        weights = weights - torch.linalg.solve(curvature, gradient)
    unit = weights[:-1] / weights[:-1].norm()
    expected = (unit @ statistics.difference).abs() * unit
    torch.testing.assert_close(probe_normal(statistics), expected, rtol=1e-2, atol=1e-3)


def test_the_mean_difference_needs_no_sample(lm: LanguageModel) -> None:
    statistics, _ = planted(False)
    assert torch.equal(find(lm, "mean-diff", statistics), statistics.difference.float())
    assert [method_named(name).needs_sample for name in METHODS] == [False, True, True]


def test_the_registry_lists_and_refuses() -> None:
    assert set(METHODS) <= set(method_names())
    with pytest.raises(FitError, match=r"method 'magic' is not one of mean-diff, pca, probe"):
        method_named("magic")
    with pytest.raises(ValueError, match="registered already"):
        register(Method("pca", lambda task: {}))


def test_a_refusal_names_the_method_and_all_others() -> None:
    with pytest.raises(FitError) as refusal:
        method_named("magic")
    assert refusal.value.message == f"method 'magic' is not one of {', '.join(method_names())}"
    with pytest.raises(ValueError, match=r"^method 'pca' is registered already$"):
        register(Method("pca", lambda task: {}))


def test_the_layers_of_a_task_are_those_wanted_or_those_with_statistics(lm: LanguageModel) -> None:
    statistics, _ = planted(True)
    assert Task(lm, {2: statistics, 0: statistics}).layers == (0, 2)
    assert Task(lm, {2: statistics}, wanted=(1, 0)).layers == (1, 0)


def test_a_method_per_layer_reads_each_layer_and_returns_float32(lm: LanguageModel) -> None:
    method = per_layer("own", lambda one: one.difference * 2, needs_sample=True, direction="twice", paper="none")
    statistics = {layer: planted(True, seed=layer)[0] for layer in (2, 0)}
    found = method.find(Task(lm, statistics))
    assert list(found) == [0, 2]
    for layer, direction in found.items():
        assert torch.equal(direction, (statistics[layer].difference * 2).float())
    assert (method.name, method.needs_sample, method.direction, method.paper) == ("own", True, "twice", "none")


@dataclass(frozen=True)
class Options:
    word: str = option("a", "A word.")
    count: int = option(2, "A number.")
    rate: float = option(0.5, "A rate.")


OWN = Method("own", lambda task: {}, options=Options, direction="d", paper="p")


def test_an_option_has_a_default_and_a_help_text() -> None:
    """Also where it is made after the import of its module."""
    made = dataclasses.make_dataclass("Made", [("word", str, option("b", "Another word."))])
    method = Method("made", lambda task: {}, options=made)
    assert method.complete({}) == {"word": "b"}
    assert method.describe()["options"] == [{"name": "word", "type": "str", "default": "b", "help": "Another word."}]


def test_a_registered_method_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", {})
    register(OWN)
    assert method_named("own") is OWN
    assert method_names() == ("own",)


def test_a_method_per_layer_needs_no_description() -> None:
    bare = per_layer("bare", lambda one: one.difference, needs_sample=False)
    assert (bare.direction, bare.paper, bare.options) == ("", "", None)


def test_a_method_describes_itself_and_its_options() -> None:
    assert OWN.describe() == {
        "name": "own",
        "direction": "d",
        "paper": "p",
        "layers": "candidates",
        "weights": False,
        "options": [
            {"name": "word", "type": "str", "default": "a", "help": "A word."},
            {"name": "count", "type": "int", "default": 2, "help": "A number."},
            {"name": "rate", "type": "float", "default": 0.5, "help": "A rate."},
        ],
    }
    bare = Method("bare", lambda task: {}, layers=lambda count: (count,)).describe()
    assert (bare["layers"], bare["options"]) == ("middle", [])


def test_options_are_completed_and_converted() -> None:
    assert OWN.complete({}) == {"word": "a", "count": 2, "rate": 0.5}
    found = OWN.complete({"word": "3", "count": "3", "rate": "3"})
    assert found == {"word": "3", "count": 3, "rate": 3.0}
    assert [type(value) for value in found.values()] == [str, int, float]
    assert type(OWN.complete({"rate": 3})["rate"]) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": "many"}, "option count is 'many', which is not of type int"),
        ({"count": 3.0}, "option count is 3.0, which is not of type int"),
        ({"count": True}, "option count is True, which is not of type int"),
        ({"word": 3}, "option word is 3, which is not of type str"),
        ({"rate": "fast"}, "option rate is 'fast', which is not of type float"),
        ({"colour": "red"}, "own has no option 'colour'; it has word, count, rate"),
    ],
)
def test_options_that_are_refused(given: dict[str, str | int | float], message: str) -> None:
    with pytest.raises(FitError) as refusal:
        OWN.complete(given)
    assert refusal.value.message == message


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("find_one", [principal_difference, probe_normal])
def test_sides_that_are_equal_have_the_zero_direction(
    find_one: Callable[[LayerStatistics], torch.Tensor], paired: bool
) -> None:
    rows = torch.ones(4, HIDDEN)
    assert not find_one(statistics_of(rows, rows, paired)).any()


def test_the_first_component_is_a_unit_vector_for_any_number_of_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    for count in (1, HIDDEN - 1, HIDDEN, HIDDEN + 1):
        rows = torch.randn(count, HIDDEN, generator=draw).double()
        component = first_component(rows)
        assert float(component.norm()) == pytest.approx(1)
        assert float((rows @ component).norm()) == pytest.approx(float(torch.linalg.svdvals(rows)[0]))
