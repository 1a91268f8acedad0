"""How many slots fit into a device's memory: what a model needs is measured, then planned with.

A share of the device's memory may be used. What is left of it beside the loaded model and one forward pass is for the
slots: their keys and values, their shifts, and what each row adds to a pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.steering.bank import SteeringBank

logger = logging.getLogger(__name__)

UTILIZATION = 0.9  # share of the device's memory that may be used
MAX_SLOTS = 128  # where no number is asked for
CONTEXT_STEP = 16  # a suggested context is a multiple of this, and at least this
GIB = 2**30
ROWS = 2  # measured together, to tell what one row costs


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes measured on a device.

    `total` is the device's memory and `used` what is taken with the model loaded and nothing running. A pass takes
    `one_pass` more, of which `row` for each row. A slot keeps `column` for the keys and values of each position, and
    `slot` for its shifts and logits.
    """

    total: int
    used: int
    one_pass: int
    row: int
    column: int
    slot: int

    def slot_of(self, context: int) -> int:
        """Bytes of one slot; its cache has a spare column."""
        return self.column * (context + 1) + self.slot + self.row

    def room(self, utilization: float) -> int:
        return int(utilization * self.total) - self.used - self.one_pass


class CudaMeter:
    """The memory of a CUDA device in bytes, as reported by its driver and torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used_and_total(self) -> tuple[int, int]:
        """What all processes on the device use now, and what there is."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total

    def peak(self, work: Callable[[], None]) -> int:
        """The most memory that `work` took at any time, beside what was taken before."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def plan_memory(
    language_model: LanguageModel,
    meter: CudaMeter,
    *,
    slots: int | None,
    context: int,
    tokens: int,
    utilization: float | None,
) -> int | None:
    """The slots that fit, by measurement.

    Warns and returns None if the model does not run over the slot cache, because the size of its own state is unknown.
    Raises ModelError if too little fits, or if a `utilization` is given for such a model.
    """
    try:
        need = measure(language_model, meter, context=context, tokens=tokens)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a pass of {tokens} prompt tokens in a context of {context} does not fit the device's memory: take a "
            f"smaller prefill chunk or context ({first_line(error)})"
        ) from error
    except Exception as error:  # an architecture may fail in any way
        if utilization is not None:
            raise ModelError(
                "this model's memory cannot be planned, since it does not run over slots "
                f"({first_line(error)}): leave gpu_memory_utilization out"
            ) from error
        logger.warning("memory is not planned: the model does not run over slots (%s)", first_line(error))
        return None
    return plan(need, slots=slots, context=context, utilization=utilization or UTILIZATION)


def plan(need: MemoryNeed, *, slots: int | None, context: int, utilization: float = UTILIZATION) -> int:
    """The given number of slots, or as many as fit up to MAX_SLOTS; the log says why.

    Raises ModelError, which names what would fit, if they do not fit or if none does.
    """
    room = need.room(utilization)
    fitting = max(0, room // need.slot_of(context))
    if (slots or 1) <= fitting:
        found = slots or min(fitting, MAX_SLOTS)
        logger.info(
            "memory: %s",
            f"{found} slots of {context} tokens take {_gib(found * need.slot_of(context))}, the model "
            f"{_gib(need.used)}, a pass {_gib(need.one_pass)}: of {_gib(need.total)}, {utilization:.0%} may be used",
        )
        return found
    wanted = "one slot" if slots in (None, 1) else f"{slots} slots"
    raise ModelError(
        f"{wanted} of {context} tokens need {_gib((slots or 1) * need.slot_of(context))} of the device's memory, and "
        f"{_gib(max(0, room))} are left of {utilization:.0%} of {_gib(need.total)}: "
        + _remedy(need, room, slots or 1, fitting)
    )


@torch.inference_mode()
def measure(language_model: LanguageModel, meter: CudaMeter, *, context: int, tokens: int) -> MemoryNeed:
    """What passes of so many prompt tokens need: the widest that an engine makes, at the far end of the context.

    Raises what the model raises if it cannot run over slots.
    """
    one, two, column, slot = _measured(language_model, meter, context, tokens)
    used, total = meter.used_and_total()  # without what was made to measure
    return MemoryNeed(total=total, used=used, one_pass=one, row=max(0, two - one), column=column, slot=slot)


def _measured(language_model: LanguageModel, meter: CudaMeter, context: int, tokens: int) -> tuple[int, int, int, int]:
    """Bytes of a pass over one row and over two, of a column and of a slot."""
    bank = SteeringBank.over(language_model, rows=ROWS)
    runner = BatchedRunner(language_model, bank, context=context)

    def run(rows: int, tokens: int) -> None:
        """A pass of so many tokens in all, each of which is scored."""
        width = min(context, max(1, tokens // rows))
        batch = [RowInput(row, [0] * width, context - width, wanted=width) for row in range(rows)]
        for logits in runner.forward_all(batch).logits:
            logits.float().logsumexp(dim=-1)

    try:
        run(1, 1)  # allocates what is made at the first use
        one, two = (meter.peak(partial(run, rows, tokens)) for rows in (1, ROWS))
        states = [state for layer in runner.cache.layers for state in (layer.keys, layer.values)]
        column = sum(state.element_size() * state[0, :, 0].numel() for state in states)
        return one, two, column, bank.shift[:, 0].nbytes + 4 * language_model.vocab_size
    finally:
        runner.close()


def _remedy(need: MemoryNeed, room: int, slots: int, fitting: int) -> str:
    remedies = [f"{fitting} slots"] if fitting else []
    columns = (room // slots - need.slot - need.row) // max(1, need.column) - 1
    if columns >= CONTEXT_STEP:
        remedies.append(f"a context of {columns // CONTEXT_STEP * CONTEXT_STEP}")
    if not remedies:
        return "free memory, raise gpu_memory_utilization, or serve a smaller model"
    return f"{' or '.join(remedies)} would fit"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
