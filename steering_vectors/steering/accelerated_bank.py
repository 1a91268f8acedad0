"""A steering bank that does the common cases faster: changes of strength, additions, fused blocks, recorded steps.

It steers exactly as `SteeringBank` does.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from steering_vectors.profiles.mixture import Mixture, Shifts
from steering_vectors.steering.bank import Hook, SteeringBank


class AcceleratedBank(SteeringBank):
    """The bank of an engine, whose rows change at every step and whose blocks may add shifts themselves."""

    @cached_property
    def _largest(self) -> float:
        """The largest number of the buffer's dtype."""
        return torch.finfo(self._shift.dtype).max

    def write(self, row: int, mixture: Mixture) -> None:
        if not self._rescale(row, mixture):
            super().write(row, mixture)

    def claim(self, layer: int, rows: int) -> torch.Tensor | None:
        """The shifts `[rows, 1, hidden]` for a block that adds them to its output itself; its hook then does nothing.

        None if there is nothing to add here, or if the step has other rows than these, steers some positions only or
        does more than add: then the hook does all of it.
        """
        step = self._step
        if step is None or step.where is not None or not self.only_adds or not self._acts(layer):
            return None
        shifts = step.shifts[layer]
        if len(shifts) != rows:
            return None
        self._claimed = layer
        return shifts

    def _rescale(self, row: int, mixture: Mixture) -> bool:
        """Give a row another strength of the one profile that it has at all blocks, in one operation.

        False, with nothing changed, if the mix differs from the row's in more than that.
        """
        scaled = mixture.scaled() if self._shift.device.type == "cpu" else None
        if scaled is None or row in self._ablations:
            return False
        unit, factor = scaled
        known = self._shifted.get(row) == unit.layers and len(unit.layers) == len(self._blocks)
        if not known or not unit.bound * abs(factor) <= self._largest:
            return False
        self._announce(row, mixture)
        torch.mul(unit.rows, factor, out=self._shift[:, row])
        self._note_norm(row, mixture)
        return True

    def _replace(self, row: int, mixture: Mixture, shifts: Shifts) -> None:
        if self._shifted.get(row) == shifts.layers and not mixture.ablations() and row not in self._ablations:
            self._put(row, shifts)  # the same layers: nothing to erase
            self._note_norm(row, mixture)
        else:
            super()._replace(row, mixture, shifts)

    def _hook_for(self, layer: int) -> Hook:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            step = self._step
            if step is None or not self._acts(layer):
                return None
            if self._claimed == layer:
                self._claimed = None
                return None
            if step.where is None and type(output) is torch.Tensor and self.only_adds:
                return output + step.shifts[layer]
            return self._steered_output(layer, output, step)

        return hook
