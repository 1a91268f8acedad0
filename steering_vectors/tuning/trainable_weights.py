"""Sets of trainable weights for one model: LoRA adapters through peft, or full copies. `close` restores the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from steering_vectors.errors import FitError
from steering_vectors.models.loading import LanguageModel

States = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The configuration of a LoRA, whose scale is alpha / rank. `targets` are peft's module names, comma-separated,
    `all-linear`, or empty for peft's choice for the architecture. Blocks above `last_block` get no updates."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str = "all-linear"
    last_block: int | None = None


class LoraWeights:
    """LoRA adapters (arXiv:2106.09685), one per name. A new adapter does not change the model."""

    def __init__(self, lm: LanguageModel, shapes: Mapping[str, LoraShape], seed: int) -> None:
        self._lm = lm
        self._peft = attach_adapters(lm, shapes, seed)
        self._activate(None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Activate an adapter; None disables all of them, which leaves the model's own weights."""
        before = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str | None) -> None:
        self._active = name
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name)

    def save(self, name: str, folder: Path) -> None:
        """Write one adapter in peft's format. Raises FitError if it cannot be written."""
        try:
            self._peft.save_pretrained(folder, selected_adapters=[name])
        except (OSError, SafetensorError) as error:
            raise FitError(f"the adapter cannot be written to {folder} ({error}); check the directory") from error

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        return [p for key, p in self._lm.model.named_parameters() if f".{name}." in key and "lora_" in key]

    def state(self, name: str) -> States:
        from peft import get_peft_model_state_dict

        return {key: value.detach().clone() for key, value in get_peft_model_state_dict(self._peft, None, name).items()}

    def load(self, name: str, state: States) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._peft, state, name)

    def close(self) -> None:
        self._peft.unload()
        self._lm.model.requires_grad_(False).eval()


def attach_adapters(lm: LanguageModel, shapes: Mapping[str, LoraShape], seed: int) -> Any:
    """Add adapters to a model and return peft's wrapper of it.

    Raises FitError if peft does not support the architecture or is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FitError("tuning by LoRA needs peft: pip install 'trimtab[rahf]'") from error

    def config_of(shape: LoraShape) -> LoraConfig:
        return LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,
            lora_dropout=shape.dropout,
            target_modules=_targets(lm, shape),
            layers_to_transform=None if shape.last_block is None else list(range(shape.last_block + 1)),
            task_type="CAUSAL_LM",
        )

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a deprecated attribute of transformers
        torch.manual_seed(seed)
        try:
            (first, config), *others = ((name, config_of(shape)) for name, shape in shapes.items())
            wrapped = get_peft_model(lm.model, config, adapter_name=first)
            for name, config in others:
                wrapped.add_adapter(name, config)
        except ValueError as error:
            raise FitError(f"peft cannot add a LoRA to {lm.identity.architecture}: {error}") from error
    for module in wrapped.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = Dropout(dropout.p)
    return wrapped


class Dropout(torch.nn.Module):
    """Dropout whose probability is rounded to 1/65536. Its mask takes a quarter of the time of `torch.nn.Dropout`'s on
    a CPU, and a quarter of the memory."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped = round(probability * 2**16)  # of 2**16 equally likely numbers

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropped == 0:
            return hidden
        draws = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64, device=hidden.device).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: hidden.numel()].view(hidden.shape) >= self.dropped - 2**15
        return (hidden * kept).mul_(2**16 / (2**16 - self.dropped))


def _targets(lm: LanguageModel, shape: LoraShape) -> list[str] | str | None:
    """Module names for peft. Its `all-linear` cannot be limited to some blocks, so the names are listed."""
    if shape.targets != "all-linear":
        return shape.targets.split(",") if shape.targets else None
    if shape.last_block is None:
        return shape.targets
    linear = (torch.nn.Linear, Conv1D)
    names = (name for block in lm.blocks for name, module in block.named_modules() if isinstance(module, linear))
    return sorted({name.rpartition(".")[2] for name in names})


class FullWeights:
    """Copies of all weights of the model, or of those of the blocks up to `last_block`, one set per name."""

    def __init__(self, lm: LanguageModel, names: Sequence[str], last_block: int | None = None) -> None:
        if lm.dtype != torch.float32:
            raise FitError("full fine-tuning needs dtype float32, because smaller types round its steps to 0")
        self._model = lm.model
        trained = [lm.model] if last_block is None else lm.blocks[: last_block + 1]
        inside = {id(p) for module in trained for p in module.parameters()}
        self._trained = {key: p for key, p in lm.model.named_parameters() if id(p) in inside}
        self._own = {key: p.data for key, p in self._trained.items()}
        self._sets = {name: {key: own.clone() for key, own in self._own.items()} for name in names}

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        self._place(self._sets[name], trained=True)
        try:
            yield
        finally:
            self._place(self._own, trained=False)

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        return list(self._trained.values())

    def state(self, name: str) -> States:
        return {key: value.clone() for key, value in self._sets[name].items()}

    def load(self, name: str, state: States) -> None:
        for key, value in state.items():
            self._sets[name][key].copy_(value)

    def close(self) -> None:
        self._sets.clear()
        self._model.eval()

    def _place(self, weights: States, *, trained: bool) -> None:
        for key, p in self._trained.items():
            p.data = weights[key]
            p.requires_grad_(trained)


TunedWeights = LoraWeights | FullWeights
"""Named sets of weights. One is active inside `use`, none outside. `parameters` are valid inside `use`."""
