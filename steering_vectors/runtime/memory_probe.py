"""Measuring what a model needs of its device's memory besides its weights.

The widest passes that the engine makes are run at the far end of the context, on one row and shared by two: what two
need more than one is what each row costs. Knows nothing of how many slots will run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.memory_plan import UTILIZATION, Need, Plan, plan
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.steering.bank import SteeringBank

logger = logging.getLogger(__name__)

ROWS = 2


class Meter(Protocol):
    """A device's memory, in bytes."""

    def used_and_total(self) -> tuple[int, int]:
        """What everyone on the device uses now, and what there is."""

    def peak(self, work: Callable[[], None]) -> int:
        """The most that `work` took at any time besides what was taken before."""


class CudaMeter:
    """The memory of a CUDA device, as its driver and torch's allocator tell it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used_and_total(self) -> tuple[int, int]:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total

    def peak(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def planned(
    language_model: LanguageModel,
    meter: Meter,
    *,
    slots: int | None,
    context: int,
    tokens: int,
    utilization: float | None,
) -> Plan | None:
    """The slots that fit, by measurement; None, with a warning, if the model keeps what it remembers in a form of its
    own, whose size nobody knows ahead. Raises ModelError if too little fits, or if that was to be bounded all the same.
    """
    try:
        need = measure(language_model, meter, context=context, tokens=tokens)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a pass of {tokens} prompt tokens in a context of {context} does not fit the device's memory: take a "
            f"smaller --prefill-chunk or --context ({first_line(error)})"
        ) from error
    except Exception as error:  # an architecture may fail in any way
        if utilization is not None:
            raise ModelError(
                "this model's memory cannot be planned, since it does not run over slots "
                f"({first_line(error)}): leave --gpu-memory-utilization out"
            ) from error
        logger.warning("memory is not planned: the model does not run over slots (%s)", first_line(error))
        return None
    found = plan(need, slots=slots, context=context, utilization=utilization or UTILIZATION)
    logger.info("memory: %s", found)
    return found


@torch.inference_mode()
def measure(language_model: LanguageModel, meter: Meter, *, context: int, tokens: int) -> Need:
    """What passes of so many prompt tokens need. Raises what the model raises, if it cannot run over slots."""
    kept = _KeptBySlots(language_model, context)
    try:
        kept.run(1, 1)  # whatever is made at the first use
        one = meter.peak(partial(kept.run, 1, tokens))
        two = meter.peak(partial(kept.run, ROWS, tokens))
        column, slot = kept.column, kept.slot
    finally:
        kept.close()
    del kept  # so that it is not counted as used
    used, total = meter.used_and_total()
    return Need(total=total, used=used, one_pass=one, row=max(0, two - one), column=column, slot=slot)


class _KeptBySlots:
    """A few slots, to be measured."""

    def __init__(self, language_model: LanguageModel, context: int) -> None:
        self._bank = SteeringBank.over(language_model, rows=ROWS)
        self._runner = BatchedRunner(language_model, self._bank, context=context)
        self._vocabulary = language_model.vocab_size

    @property
    def column(self) -> int:
        """Bytes of the keys and values of one position."""
        states = [kept for layer in self._runner.cache.layers for kept in (layer.keys, layer.values)]
        return sum(kept.element_size() * kept[0, :, 0].numel() for kept in states)

    @property
    def slot(self) -> int:
        """Bytes of a row's shifts, and of its logits."""
        shift = self._bank.shift
        return shift[:, 0].numel() * shift.element_size() + 4 * self._vocabulary

    def run(self, rows: int, tokens: int) -> None:
        """A pass of so many prompt tokens in all, at the end of the context, each of which is scored."""
        context = self._runner.context
        width = min(context, max(1, tokens // rows))
        works = [RowInput(row, [0] * width, context - width, wanted=width) for row in range(rows)]
        for logits in self._runner.forward_all(works).logits:
            logits.float().logsumexp(dim=-1)

    def close(self) -> None:
        self._runner.close()
