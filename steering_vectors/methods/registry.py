"""The methods by name. A family of methods registers itself when `steering_vectors.methods` is imported.

Owns what a method is given and what it must return. Knows nothing of any single one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example
from steering_vectors.errors import FitError
from steering_vectors.measures.activations import LayerStatistics, Tokens
from steering_vectors.models.loading import LanguageModel
from steering_vectors.progress import Progress

Directions = dict[int, torch.Tensor]
Options = TypeVar("Options")


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What a method may work on.

    `statistics` has one entry per wanted block; a first step on its own needs none, and `wanted` names the blocks.
    A method that trains finds the model and the training examples here,
    as texts and as token ids (entry i of both is the same example; with `paired`, positive i belongs to negative i).
    `name` is the profile's; `options` are those of the method, as they were given.
    """

    lm: LanguageModel
    statistics: Mapping[int, LayerStatistics]
    positives: Sequence[Example] = ()
    negatives: Sequence[Example] = ()
    positive_ids: Sequence[Encoded] = ()
    negative_ids: Sequence[Encoded] = ()
    paired: bool = False
    name: str = ""
    tokens: Tokens = "response"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    wanted: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return self.wanted or tuple(sorted(self.statistics))

    def read_options(self, kind: type[Options]) -> Options:
        """The options as a method's own dataclass, defaults filled in."""
        return kind(**self.options)


@dataclass(frozen=True, slots=True)
class Method:
    """A way to find directions: float32 `[hidden]` for each of the task's layers.

    `needs_sample` says that the statistics must hold a sample of pooled vectors, not only means. `options` is the
    dataclass of the method's options, each with a default. `layers` are the blocks it looks at when they are to be
    chosen automatically, if not all candidates.
    """

    name: str
    find: Callable[[Task], Directions]
    needs_sample: bool = False
    options: type[Any] | None = None
    layers: Callable[[int], tuple[int, ...]] | None = None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every option of the method with its value; texts are read as the type of the default.

        Raises FitError for an option that the method does not have, naming those it has, and for an unusable value.
        """
        known = {one.name: one.default for one in fields(self.options)} if self.options is not None else {}
        for name in given:
            if name not in known:
                raise FitError(f"{self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
        return {name: _converted(name, given.get(name, default), default) for name, default in known.items()}


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


def _converted(name: str, value: Any, default: Any) -> Any:
    """A value as the type that the option's default has."""
    kind = type(default)
    try:
        if isinstance(value, str) and kind is not str:
            value = kind(value)
        if kind is float and isinstance(value, int):
            value = float(value)
    except ValueError:
        raise FitError(f"option {name} is {value!r}, which is no {kind.__name__}") from None
    if type(value) is not kind:
        raise FitError(f"option {name} is {value!r}, which is no {kind.__name__}")
    return value
