"""The methods by name. A family of methods registers itself when `steering_vectors.methods` is imported.

Owns what a method is given and what it must return. Knows nothing of any single one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steering_vectors.activations import LayerStatistics
from steering_vectors.batches import Encoded, Progress
from steering_vectors.chat import Example
from steering_vectors.errors import FitError
from steering_vectors.models import LanguageModel

Directions = dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a method may work on.

    `statistics` has one entry per wanted block. A method that trains finds the model and the training examples here,
    as texts and as token ids (entry i of both is the same example; with `paired`, positive i belongs to negative i).
    """

    lm: LanguageModel
    statistics: Mapping[int, LayerStatistics]
    positives: Sequence[Example] = ()
    negatives: Sequence[Example] = ()
    positive_ids: Sequence[Encoded] = ()
    negative_ids: Sequence[Encoded] = ()
    paired: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.statistics))


@dataclass(frozen=True, slots=True)
class Method:
    """A way to find directions: float32 `[hidden]` for each of the task's layers.

    `needs_sample` says that the statistics must hold a sample of pooled vectors, not only means.
    """

    name: str
    find: Callable[[Task], Directions]
    needs_sample: bool = False


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method; a name that is taken is an error of the programmer."""
    if method.name in _METHODS:
        raise ValueError(f"method {method.name!r} is registered already")
    _METHODS[method.name] = method


def method_named(name: str) -> Method:
    """The method of this name. Raises FitError listing those there are."""
    if name not in _METHODS:
        raise FitError(f"method {name!r} is not one of {', '.join(method_names())}")
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    return tuple(_METHODS)


def per_layer(name: str, direction: Callable[[LayerStatistics], torch.Tensor], *, needs_sample: bool) -> Method:
    """A method that looks at each block's statistics alone."""

    def find(task: Task) -> Directions:
        return {layer: direction(task.statistics[layer]).to(torch.float32) for layer in task.layers}

    return Method(name, find, needs_sample)
