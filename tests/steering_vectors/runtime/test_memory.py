"""The number of slots that fit a device: the arithmetic, and the measurement of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.memory import GIB, MAX_SLOTS, MemoryNeed, measure, plan, plan_memory
from tests.support.tiny import BLOCKS, HIDDEN, tiny_model
from tests.support.tiny_tokenizers import VOCAB, tiny_tokenizer

# A model of 8B parameters in bfloat16 on a device of 24 GiB: 32 blocks of 8 heads of 128, keys and values
COLUMN = 32 * 2 * 8 * 128 * 2
NEED = MemoryNeed(total=24 * GIB, used=16 * GIB, one_pass=GIB, row=64 * 2**20, column=COLUMN, slot=2**20)


def test_as_many_slots_as_fit(caplog: pytest.LogCaptureFixture) -> None:
    """4.6 of 21.6 GiB are left; a slot of 4097 columns takes 512.1 MiB, and 65 MiB more."""
    with caplog.at_level(logging.INFO):
        found = plan(NEED, slots=None, context=4096)
    assert found == int(4.6 * 1024 / (512.125 + 65)) == 8
    assert NEED.used + NEED.one_pass + found * NEED.slot_of(4096) <= 0.9 * NEED.total
    assert NEED.used + NEED.one_pass + (found + 1) * NEED.slot_of(4096) > 0.9 * NEED.total
    assert caplog.messages == [
        "memory: 8 slots of 4096 tokens take 4.51 GiB, the model 16.00 GiB, a pass 1.00 GiB: "
        "of 24.00 GiB, 90% may be used"
    ]


def test_slots_depend_on_utilization_and_context() -> None:
    assert plan(NEED, slots=None, context=4096, utilization=0.8) == 3
    assert plan(NEED, slots=None, context=1024) == 24


def test_more_slots_than_the_default_maximum_must_be_requested() -> None:
    small = MemoryNeed(total=24 * GIB, used=2 * GIB, one_pass=GIB, row=0, column=1000, slot=0)
    assert plan(small, slots=None, context=4096) == MAX_SLOTS
    assert plan(small, slots=1000, context=4096) == 1000


def test_slots_that_do_not_fit_are_refused_with_what_would() -> None:
    with pytest.raises(ModelError) as failure:
        plan(NEED, slots=16, context=4096)
    assert failure.value.message == (
        "16 slots of 4096 tokens need 9.02 GiB of the device's memory, and 4.60 GiB are left of 90% of 24.00 GiB: "
        "8 slots or a context of 1824 would fit"
    )
    assert plan(NEED, slots=8, context=4096) == 8
    assert plan(NEED, slots=16, context=1824) == 16


def test_a_context_too_large_for_one_slot_is_refused() -> None:
    with pytest.raises(ModelError, match=r"one slot of 131072 tokens need.*: a context of 37\d\d\d would fit"):
        plan(NEED, slots=None, context=131072)


def test_a_model_that_leaves_nothing() -> None:
    full = MemoryNeed(total=24 * GIB, used=22 * GIB, one_pass=GIB, row=0, column=COLUMN, slot=0)
    with pytest.raises(ModelError, match=r"0\.00 GiB are left.*: free memory, raise gpu_memory_utilization, or"):
        plan(full, slots=None, context=4096)


class Tape:
    """A device of 1 GiB that is half full. A pass takes 10 MiB per row and 1 KiB per token of a row. It records the
    shapes of the model's inputs."""

    def __init__(self, language_model: LanguageModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        embedding = language_model.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _module, given: self.shapes.append(tuple(given[0].shape)))

    def used_and_total(self) -> tuple[int, int]:
        return GIB // 2, GIB

    def peak(self, work: Callable[[], None]) -> int:
        before = len(self.shapes)
        work()
        return max(rows * 10 * 2**20 + rows * tokens * 2**10 for rows, tokens in self.shapes[before:])


def tiny(architecture: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer(), name=architecture)


def test_a_slot_is_measured() -> None:
    """Per block two key-value heads of size eight in bfloat16 and a shift, and the logits in float32."""
    language_model = tiny("llama", torch.bfloat16)
    tape = Tape(language_model)
    need = measure(language_model, tape, context=64, tokens=32)
    assert tape.shapes == [(1, 1), (1, 32), (2, 16)]  # the first pass triggers one-time allocations
    assert need.column == BLOCKS * 2 * (2 * 8) * 2
    assert need.slot == BLOCKS * HIDDEN * 2 + 4 * VOCAB
    assert (need.one_pass, need.row) == (10 * 2**20 + 32 * 2**10, 10 * 2**20)
    assert (need.used, need.total) == (GIB // 2, GIB)


def test_a_plan_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        language_model = tiny("gpt2")
        found = plan_memory(language_model, Tape(language_model), slots=None, context=64, tokens=32, utilization=None)
    assert found == int((0.4 * 1024 - 10) / 10.02)
    assert f"memory: {found} slots" in caplog.text


def test_a_model_without_slots_is_not_planned(caplog: pytest.LogCaptureFixture) -> None:
    language_model = tiny("jamba")
    options = {"slots": None, "context": 64, "tokens": 32}
    assert plan_memory(language_model, Tape(language_model), utilization=None, **options) is None
    assert "memory is not planned" in caplog.text
    with pytest.raises(ModelError, match="leave gpu_memory_utilization out"):
        plan_memory(language_model, Tape(language_model), utilization=0.5, **options)
