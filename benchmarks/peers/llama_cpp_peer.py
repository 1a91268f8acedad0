"""llama.cpp through llama-cpp-python's low-level calls: all rows in one batch, with one control vector for all.

Tokens are sampled with numpy on the logits in place, which is faster than llama.cpp's samplers.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import llama_cpp
import numpy as np
from commands import Batch, Setup, serve, timed

PREFILL_TOKENS = 2048
STRENGTH = 0.02


class Llama:
    def __init__(self, setup: Setup) -> None:
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(setup.gguf.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {setup.gguf}")
        self._vocabulary = setup.vocabulary
        self._context = llama_cpp.llama_init_from_model(self._model, _context_parameters(setup))
        if not self._context:
            raise RuntimeError("llama.cpp cannot create a context")
        self._batch = llama_cpp.llama_batch_init(PREFILL_TOKENS, 0, 1)
        self._steered = setup.steered
        self._steer(setup.steered)

    def decode(self, batch: Batch) -> list[float]:
        return [after - before for before, after in zip(*self._run(batch)[1], strict=True)]

    def prefill(self, batch: Batch) -> float:
        return timed(lambda: self._prompts(batch))

    def tokens(self, batch: Batch) -> list[list[int]]:
        self._steer(False)
        written = self._run(batch)[0]
        self._steer(self._steered)
        return written

    def after(self, prompt: list[int], written: list[int]) -> list[int]:
        """The most likely token at each place of a continuation, given the tokens before it."""
        self._clear()
        given = [*prompt, *written[:-1]]
        return self._compute([(token, place, 0, place >= len(prompt) - 1) for place, token in enumerate(given)])

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """A prompt's greedy continuation."""
        written = self.after(prompt, [0])
        while len(written) < tokens:
            written += self._compute([(written[-1], len(prompt) + len(written) - 1, 0, True)])
        return written

    def _run(self, batch: Batch) -> tuple[list[list[int]], tuple[list[float], list[float]]]:
        """The tokens of each row, and the start and end times of the steps after the first token."""
        written = [self._prompts(batch)]
        stamps = [time.perf_counter()]
        for step in range(batch.new - 1):
            position = batch.context + step
            written.append(self._compute([(token, position, row, True) for row, token in enumerate(written[-1])]))
            stamps.append(time.perf_counter())
        return [list(row) for row in zip(*written, strict=True)], (stamps[:-1], stamps[1:])

    def _prompts(self, batch: Batch) -> list[int]:
        """Compute all prompts and return the first token of each row."""
        self._clear()
        last = batch.context - 1
        entries = [
            (token, position, row, position == last)
            for row, prompt in enumerate(batch.prompts)
            for position, token in enumerate(prompt)
        ]
        parts = [entries[start : start + PREFILL_TOKENS] for start in range(0, len(entries), PREFILL_TOKENS)]
        return [token for part in parts for token in self._compute(part)]

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _compute(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode entries of (token, position, row, whether logits are needed). Returns the most likely next tokens."""
        given = self._batch
        given.n_tokens = len(entries)
        for place, (token, position, row, drawn) in enumerate(entries):
            given.token[place], given.pos[place], given.logits[place] = token, position, drawn
            given.n_seq_id[place], given.seq_id[place][0] = 1, row
        if (status := llama_cpp.llama_decode(self._context, given)) != 0:
            raise RuntimeError(f"llama_decode ended with status {status}")
        drawn_at = [place for place, entry in enumerate(entries) if entry[3]]
        return [self._likeliest(place) for place in drawn_at]

    def _likeliest(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def _steer(self, steered: bool) -> None:
        """Set one direction at every block except the first, which llama.cpp cannot steer; or remove it."""
        blocks, hidden = llama_cpp.llama_model_n_layer(self._model), llama_cpp.llama_model_n_embd(self._model)
        values = (STRENGTH * np.random.default_rng(0).standard_normal((blocks - 1, hidden))).astype(np.float32)
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)) if steered else None
        if llama_cpp.llama_set_adapter_cvec(self._context, pointer, values.size, hidden, 1, blocks) != 0:
            raise RuntimeError("llama.cpp refuses the control vector")


def _context_parameters(setup: Setup) -> llama_cpp.llama_context_params:
    found = llama_cpp.llama_context_default_params()
    found.n_seq_max, found.n_ctx, found.n_batch = setup.rows, setup.rows * setup.length, PREFILL_TOKENS
    found.n_threads = found.n_threads_batch = setup.threads
    return found


if __name__ == "__main__":
    serve(Llama)
