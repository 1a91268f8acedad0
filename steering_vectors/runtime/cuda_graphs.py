"""Decoding steps recorded as CUDA graphs: one launch in place of some thousand."""

from __future__ import annotations

from collections.abc import Callable

import torch

from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.static_decoding import Replay, StaticRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank

WARM_UP = 2


class GraphRecorder:
    """Records steps on one CUDA device as graphs. The tensors that a step reads must stay at their addresses.

    All graphs share one memory pool, which is safe because they never run at the same time and copy their results to a
    buffer outside of the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Run the step a few times, so that everything made at first use exists, then record it.

        Raises RuntimeError if the step does what a graph cannot hold, such as waiting for the device.
        """
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(current):  # a recording that fails would leave the side stream the current one
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
            current.wait_stream(self._stream)
            # other threads may use the device meanwhile, to check a profile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay


class GraphRunner(StaticRunner):
    """The static runner on a CUDA device, its steps replayed as graphs.

    A graph is recorded when its pair of buckets first comes up, which takes as long as a few tens of steps. There are
    dozens of pairs, few of which a server meets, so recording all of them would only delay the start.
    """

    path = "batched, CUDA graphs"

    def __init__(self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context, record=GraphRecorder(language_model.device))
