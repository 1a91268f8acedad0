"""The batched runner with fused decoder blocks, for a CPU whose kernels compute a whole block in one call."""

from __future__ import annotations

from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.fused_blocks import fused_blocks
from steering_vectors.runtime.runner import BatchedRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank


class FusedRunner(BatchedRunner):
    """Replaces the forward of each block while it is open. Raises ModelError if the blocks cannot be fused."""

    path = "batched, fused blocks"

    def __init__(self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int) -> None:
        fused = fused_blocks(language_model.blocks, bank)
        super().__init__(language_model, bank, context=context)
        self._fused = fused
        for block in fused:
            block.attach()

    def close(self) -> None:
        super().close()
        for block in self._fused:
            block.detach()
