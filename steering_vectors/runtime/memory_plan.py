"""How many slots fit into a device's memory: arithmetic on what was measured, no torch.

Everyone on the device together may use a share of it. What is left of that share, once the model is loaded and a pass
has what it needs, is for the slots: their keys and values, their shifts, and what each row adds to a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from steering_vectors.errors import ModelError

UTILIZATION = 0.9
MOST_SLOTS = 128  # chosen at most where nobody asked for more
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes measured on a device: all of it, and what of it is used with the model loaded and nothing running; then
    what a pass takes besides, how much of that comes with each row, and what a slot keeps, by column and by itself."""

    total: int
    used: int
    one_pass: int
    row: int
    column: int
    slot: int

    def slot_of(self, context: int) -> int:
        """Bytes of one slot; a column is spare."""
        return self.column * (context + 1) + self.slot + self.row

    def room(self, utilization: float) -> int:
        """Bytes that are left for slots."""
        return int(utilization * self.total) - self.used - self.one_pass


@dataclass(frozen=True, slots=True)
class Plan:
    """The slots and the context to run with, and why."""

    slots: int
    context: int
    need: Need
    utilization: float

    def __str__(self) -> str:
        need = self.need
        return (
            f"{self.slots} slots of {self.context} tokens take {_gib(self.slots * need.slot_of(self.context))}, "
            f"what is loaded {_gib(need.used)}, a pass {_gib(need.one_pass)}: of {_gib(need.total)}, "
            f"{self.utilization:.0%} may be used"
        )


def plan(need: Need, *, slots: int | None, context: int, utilization: float = UTILIZATION) -> Plan:
    """As many slots as fit, `MOST_SLOTS` at most, or as many as are asked for. Raises ModelError that names what would
    fit, if these do not or if none does."""
    room = need.room(utilization)
    fitting = max(0, room // need.slot_of(context))
    if (slots or 1) <= fitting:
        return Plan(slots or min(fitting, MOST_SLOTS), context, need, utilization)
    wanted = "one slot" if slots in (None, 1) else f"{slots} slots"
    raise ModelError(
        f"{wanted} of {context} tokens need {_gib((slots or 1) * need.slot_of(context))} of the device's memory, and "
        f"{_gib(max(0, room))} are left of {utilization:.0%} of {_gib(need.total)}: "
        + _remedy(need, room, slots or 1, fitting)
    )


def _remedy(need: Need, room: int, slots: int, fitting: int) -> str:
    """Which flags would do."""
    remedies = [f"--slots {fitting}"] if fitting else []
    columns = (room // slots - need.slot - need.row) // max(1, need.column) - 1  # rows of it may need less
    if columns >= 16:
        remedies.append(f"--context {columns // 16 * 16}")
    if not remedies:
        return "free memory, raise --gpu-memory-utilization, or serve a smaller model"
    return f"{' or '.join(remedies)} would fit"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
