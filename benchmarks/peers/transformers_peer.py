"""transformers: `generate` over a padded batch, or its continuous batching with the argument `continuous`.

Neither can steer. All prompts of a case have the same length, so padding costs nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch
import transformers
from commands import Batch, Setup, serve, steps_between, timed

PAGE = 256


class Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion that never stops and records the time of each token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


class Generate:
    def __init__(self, setup: Setup) -> None:
        self.version = f"transformers {transformers.__version__}"
        self._model = loaded(setup)

    def decode(self, batch: Batch) -> list[float]:
        clock = Clock()
        self._run(batch, clock)
        return steps_between([clock.stamps])

    def prefill(self, batch: Batch) -> float:
        return timed(lambda: self._run(batch, Clock()))

    def tokens(self, batch: Batch) -> list[list[int]]:
        written: list[list[int]] = self._run(batch, Clock())[:, batch.context :].tolist()
        return written

    def _run(self, batch: Batch, clock: Clock) -> torch.Tensor:
        ids = torch.tensor(batch.prompts)
        found: torch.Tensor = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=batch.new,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return found


class Continuous:
    """Continuous batching. Pages and tokens per batch are set, because there is no GPU memory to derive them from."""

    def __init__(self, setup: Setup) -> None:
        self.version = f"transformers {transformers.__version__}, continuous batching"
        self._model = loaded(setup)
        self._model.generation_config.eos_token_id = -1
        self._model.generation_config.do_sample = False
        self._options = transformers.ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=setup.rows * (setup.length // PAGE + 2),
            max_batch_tokens=2048,
            max_requests_per_batch=setup.rows,
        )

    def decode(self, batch: Batch) -> list[float]:
        return steps_between([output.timestamps for output in self._run(batch)])

    def prefill(self, batch: Batch) -> float:
        """Seconds from the call to the last row's first token, without starting and stopping the thread."""
        began = time.perf_counter()
        return max(output.timestamps[0] for output in self._run(batch)) - began

    def tokens(self, batch: Batch) -> list[list[int]]:
        return [list(output.generated_tokens) for output in self._run(batch)]

    def _run(self, batch: Batch) -> list[Any]:
        outputs = self._model.generate_batch(
            inputs=batch.prompts,
            continuous_batching_config=self._options,
            max_new_tokens=batch.new,
            record_timestamps=True,
            warmup=False,
        )
        if len(outputs) < batch.rows or any(output.error for output in outputs.values()):
            raise RuntimeError(f"generate_batch failed: {[output.error for output in outputs.values()]}")
        return list(outputs.values())


def loaded(setup: Setup) -> Any:
    """The model in bfloat16, without an end-of-text token."""
    torch.set_num_threads(setup.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


if __name__ == "__main__":
    serve(Continuous if "continuous" in sys.argv else Generate)
