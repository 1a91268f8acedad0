"""repeng and steering-vectors as documented: one request after another, each with its own vector.

Both steer one request at a time, so sixteen requests with sixteen steerings are sixteen calls of `generate`. The
argument selects the library.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch
import transformers
from commands import Batch, Setup, serve, timed

STRENGTH = 0.02


class Library:
    """A steering library. `_steered_by` generates with the vectors of one request."""

    package: str

    def __init__(self, setup: Setup) -> None:
        self.version = f"{self.package} {version(self.package)}, transformers {transformers.__version__}"
        torch.set_num_threads(setup.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            setup.model, config=_config(setup.model), torch_dtype=torch.bfloat16
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._blocks = self._model.config.num_hidden_layers
        draw = torch.Generator().manual_seed(0)
        shape = (setup.rows, self._blocks, self._model.config.hidden_size)
        self._directions = STRENGTH * torch.randn(shape, generator=draw)

    def steered(self, batch: Batch) -> float:
        rows = zip(self._directions, batch.prompts, strict=False)
        return timed(lambda: [self._one(directions, prompt, batch.new) for directions, prompt in rows])

    def tokens(self, batch: Batch) -> list[list[int]]:
        """Unsteered tokens, through vectors of zeros."""
        still = torch.zeros_like(self._directions[0])
        return [self._one(still, prompt, batch.new) for prompt in batch.prompts]

    def _one(self, directions: torch.Tensor, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": new}
        written: list[int] = self._generate(directions, options)[0, len(prompt) :].tolist()
        if len(written) != new:
            raise RuntimeError(f"{self.package} wrote {len(written)} tokens, not {new}")
        return written

    def _generate(self, directions: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Generate with `directions[l]` added to the output of block l."""
        raise NotImplementedError


def _config(model: str) -> Any:
    """The model's configuration, with the rotary base under its old name too, for older versions of transformers."""
    config = transformers.AutoConfig.from_pretrained(model)
    if int(transformers.__version__.split(".")[0]) < 5:
        config.rope_theta = config.rope_parameters["rope_theta"]
    return config


class Repeng(Library):
    package = "repeng"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from repeng import ControlModel

        self._model = ControlModel(self._model, list(range(self._blocks)))

    def _generate(self, directions: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        from repeng import ControlVector

        by_block = dict(enumerate(directions.numpy()))
        self._model.set_control(ControlVector(model_type="llama", directions=by_block), 1.0)
        found: torch.Tensor = self._model.generate(**options)
        self._model.reset()
        return found


class SteeringVectors(Library):
    package = "steering-vectors"

    def _generate(self, directions: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        from steering_vectors import SteeringVector

        vector = SteeringVector(dict(enumerate(directions.to(self._model.dtype))))
        with vector.apply(self._model):
            found: torch.Tensor = self._model.generate(**options)
        return found


if __name__ == "__main__":
    serve({"repeng": Repeng, "steering-vectors": SteeringVectors}[sys.argv[1]])
