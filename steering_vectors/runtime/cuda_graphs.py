"""Recording steps as CUDA graphs: one launch in place of some thousand.

A step is run a few times on a side stream, so that whatever is made at first use is there, then recorded on it. All
graphs share one pool of memory, which is sound because they never run side by side and leave their results in a buffer
outside of it. Owns how a step is recorded; what it computes is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.static_decoding import Replay, StaticRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank

WARM_UP = 2


class GraphRecorder:
    """Turns steps on one CUDA device into graphs. What a step reads must stay at its address for as long."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Raises RuntimeError if the step does what no graph can hold, such as waiting for the device."""
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(current):  # a recording that fails would leave the side stream the current one
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
            current.wait_stream(self._stream)
            # other threads may go on using the device, for a profile that is being checked
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay


class GraphRunner(StaticRunner):
    """The static runner on a CUDA device, its steps replayed as graphs.

    Each is recorded when it first comes up, which takes as long as a few tens of steps: there are dozens of pairs of
    buckets, of which a server meets few, so that recording all of them would only make the start long."""

    path = "batched, CUDA graphs"

    def __init__(self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context, record=GraphRecorder(language_model.device))
