"""Weights that are trained beside a model's own and put in their place: LoRA through peft, or a copy of all of them.

Owns how sets of weights come and go on one model. After `close` the model is what it was. Knows nothing of losses or
of data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from steering_vectors.errors import FitError
from steering_vectors.models.loading import LanguageModel

States = dict[str, torch.Tensor]


class TunedWeights(Protocol):
    """Named sets of weights, of which one acts inside `use` and none outside."""

    def use(self, name: str) -> AbstractContextManager[None]: ...

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        """What is trained of a set; valid inside `use(name)`."""

    def state(self, name: str) -> States:
        """A copy of a set, by parameter."""

    def load(self, name: str, state: States) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Rank, scale (alpha / rank) and dropout of low-rank updates. `targets` are peft's module names, comma-separated,
    `all-linear`, or empty for peft's choice for the architecture; `last_block` is the highest that gets updates."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: str = "all-linear"
    last_block: int | None = None


class LoraWeights:
    """Low-rank updates (arXiv:2106.09685), one adapter per name; they begin as no change at all."""

    def __init__(self, lm: LanguageModel, shapes: Mapping[str, LoraShape], seed: int) -> None:
        self._lm = lm
        self._peft = attach_adapters(lm, shapes, seed)
        self._activate(None)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        with self._acting(name):
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The model's own weights alone, inside `use`."""
        with self._acting(None):
            yield

    @contextmanager
    def _acting(self, name: str | None) -> Iterator[None]:
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
        """Write one adapter in peft's format. Raises FitError if that fails."""
        try:
            self._peft.save_pretrained(folder, selected_adapters=[name])
        except (OSError, SafetensorError) as error:
            raise FitError(f"the adapter cannot be written to {folder}: {error}") from error

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
    """Put adapters into a model; peft's wrapper of it.

    Raises FitError if the architecture has no place for them, or without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise FitError("tuning by LoRA needs peft: pip install 'trimtab[rahf]'") from error

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers for an attribute's old name
        torch.manual_seed(seed)
        try:
            (first, shape), *others = shapes.items()
            wrapped = get_peft_model(lm.model, LoraConfig(**_config(lm, shape)), adapter_name=first)
            for name, shape in others:
                wrapped.add_adapter(name, LoraConfig(**_config(lm, shape)))
        except ValueError as error:
            raise FitError(f"LoRA cannot be put into {lm.identity.architecture}: {error}") from error
    return wrapped


def _config(lm: LanguageModel, shape: LoraShape) -> dict[str, Any]:
    return {
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": _targets(lm, shape),
        "layers_to_transform": None if shape.last_block is None else list(range(shape.last_block + 1)),
        "task_type": "CAUSAL_LM",
    }


def _targets(lm: LanguageModel, shape: LoraShape) -> list[str] | str | None:
    """Module names as peft takes them; it has no `all-linear` for some blocks only, so these are listed."""
    if shape.targets != "all-linear" or shape.last_block is None:
        return shape.targets if shape.targets == "all-linear" else shape.targets.split(",") if shape.targets else None
    linear = (torch.nn.Linear, Conv1D)
    names = (name for block in lm.blocks for name, module in block.named_modules() if isinstance(module, linear))
    return sorted({name.rpartition(".")[2] for name in names})


class FullWeights:
    """Copies of the model's weights, one set per name: of all, or of the blocks up to `last_block`."""

    def __init__(self, lm: LanguageModel, names: Sequence[str], last_block: int | None = None) -> None:
        if lm.dtype != torch.float32:
            raise FitError("full fine-tuning needs the model in float32 (its steps round to nothing): --dtype float32")
        self._model = lm.model
        blocks = None if last_block is None else lm.blocks[: last_block + 1]
        inside = None if blocks is None else {id(p) for block in blocks for p in block.parameters()}
        self._trained = {key: p for key, p in lm.model.named_parameters() if inside is None or id(p) in inside}
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
