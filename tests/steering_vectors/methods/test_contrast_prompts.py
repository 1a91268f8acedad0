"""`contrast-prompts`: the instructions of its options, and which responses are read, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.methods import Task, method_named
from steering_vectors.methods.contrast_prompts import InstructionOptions, task_twins
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.instructions import DEFAULTS, GENERAL, Instructions
from steering_vectors.tuning.paired_reading import mean_differences
from tests.support.planted import planted_model, planted_task

pytestmark = pytest.mark.slow


@pytest.fixture
def task() -> Task:
    return planted_task(planted_model()[0], "contrast-prompts")


def lm_of(task: Task, context: int) -> LanguageModel:
    task.lm.model.config.max_position_embeddings = context
    return task.lm


def test_instructions_are_those_of_the_goal_or_of_the_profile_s_name() -> None:
    assert InstructionOptions(goal="helpful").instructions("harmless") == DEFAULTS["helpful"]
    assert InstructionOptions().instructions("harmless") == DEFAULTS["harmless"]
    assert InstructionOptions().instructions("my-own-name") == DEFAULTS[GENERAL]
    own = InstructionOptions(goal="helpful", positive="Do.", negative="Do not.")
    assert own.instructions("harmless") == Instructions("Do.", "Do not.")
    with pytest.raises(FitError):
        InstructionOptions(positive="Do.").instructions("helpful")


@pytest.mark.parametrize("tokens", ["response", "last"])
def test_the_difference_is_read_at_the_tokens_of_the_task(task: Task, tokens: str) -> None:
    asked = replace(task, tokens=tokens)
    twins = task_twins(asked, asked.read_options(InstructionOptions), max_twins=None)
    assert max(len(twin.response) for twin in twins) > 1
    wanted = mean_differences(asked.lm, twins, asked.layers, tokens=asked.tokens)
    found = method_named("contrast-prompts").find(asked)
    assert all(torch.equal(found[layer], wanted[layer].float()) for layer in asked.layers)


def test_the_sample_of_responses_is_drawn_from_the_seed(task: Task) -> None:
    options = task.read_options(InstructionOptions)
    first, again, other = (task_twins(replace(task, seed=seed), options, max_twins=5) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == len(other) == 5


def test_examples_beyond_the_context_are_left_out(task: Task) -> None:
    options = task.read_options(InstructionOptions)
    lengths = sorted(twin.length for twin in task_twins(task, options, max_twins=None))
    assert lengths[0] < lengths[-1]
    short = replace(task, lm=lm_of(task, lengths[-1] - 1))
    kept = sorted(twin.length for twin in task_twins(short, options, max_twins=None))
    assert kept == [length for length in lengths if length < lengths[-1]]
    with pytest.raises(FitError, match="no example fits"):
        task_twins(replace(task, lm=lm_of(task, lengths[0] - 1)), options, max_twins=None)
