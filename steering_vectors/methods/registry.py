"""The registry of methods: what a method receives, what it returns, and how it is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar, cast

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example
from steering_vectors.errors import FitError
from steering_vectors.measures.activations import LayerStatistics, Tokens
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import OptionValue
from steering_vectors.progress import Progress

Directions = dict[int, torch.Tensor]
Options = TypeVar("Options")
HELP = "help"  # key of an option's help text in its field's metadata


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The input of a method.

    `statistics` has one entry per block to fit. Training examples are given as texts and as token ids: entry i of both
    is the same example, and with `paired` positive i and negative i come from one row. `name` is the profile's name,
    `options` are the method's complete options. `wanted` names the blocks where there are no statistics.
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
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    progress: Progress | None = None
    wanted: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        return self.wanted or tuple(sorted(self.statistics))

    def read_options(self, kind: type[Options]) -> Options:
        """The options as an instance of the method's options class."""
        values: dict[str, Any] = dict(self.options)
        return kind(**values)


def option(default: OptionValue, text: str) -> Any:
    """A field of an options class: its default, and its help text in `trimtab methods`."""
    return field(default=default, metadata={HELP: text})


class OptionDescription(TypedDict):
    name: str
    type: str
    default: OptionValue
    help: str


class MethodDescription(TypedDict):
    """A method as `trimtab methods --json` prints it. `layers` says which blocks `--layers auto` considers, `weights`
    whether the method can use weights of rows."""

    name: str
    direction: str
    paper: str
    layers: str
    weights: bool
    options: list[OptionDescription]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to find directions: float32 `[hidden]` for each of the task's layers.

    `needs_sample` says that the statistics must hold a sample of pooled vectors, not only means. `options` is the
    dataclass of the method's options, each with a default. `layers` gives the blocks that `--layers auto` considers,
    from the number of blocks; all candidates if it is None. `direction` and `paper` describe the method. `reads_labels`
    says that the direction depends on which responses are preferred, `weighs` that rows may count more than others.
    """

    name: str
    find: Callable[[Task], Directions]
    needs_sample: bool = False
    options: type[Any] | None = None
    layers: Callable[[int], tuple[int, ...]] | None = None
    direction: str = ""
    paper: str = ""
    reads_labels: bool = True
    weighs: bool = False

    def complete(self, given: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """Add the defaults to the given options. A text is converted to the type of the default.

        Raises FitError for an option that the method does not have, and for a value of another type.
        """
        known = {one["name"]: one["default"] for one in self._options()}
        for name in given:
            if name not in known:
                raise FitError(f"{self.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
        return {name: _converted(name, given.get(name, default), default) for name, default in known.items()}

    def describe(self) -> MethodDescription:
        return {
            "name": self.name,
            "direction": self.direction,
            "paper": self.paper,
            "layers": "candidates" if self.layers is None else "middle",
            "weights": self.weighs,
            "options": self._options(),
        }

    def _options(self) -> list[OptionDescription]:
        return [
            {
                "name": one.name,
                "type": type(one.default).__name__,
                "default": cast(OptionValue, one.default),
                "help": one.metadata.get(HELP, ""),
            }
            for one in (fields(self.options) if self.options is not None else ())
        ]


_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method. Raises ValueError for a name that is taken."""
    if method.name in _METHODS:
        raise ValueError(f"method {method.name!r} is registered already")
    _METHODS[method.name] = method


def method_named(name: str) -> Method:
    """Return a method by name. Raises FitError, with the names that exist, for an unknown one."""
    if name not in _METHODS:
        raise FitError(f"method {name!r} is not one of {', '.join(method_names())}")
    return _METHODS[name]


def method_names() -> tuple[str, ...]:
    return tuple(_METHODS)


def per_layer(
    name: str,
    direction_of: Callable[[LayerStatistics], torch.Tensor],
    *,
    needs_sample: bool,
    direction: str = "",
    paper: str = "",
) -> Method:
    """A method that reads each block's statistics on their own, with the weights of rows."""

    def find(task: Task) -> Directions:
        return {layer: direction_of(task.statistics[layer]).to(torch.float32) for layer in task.layers}

    return Method(name, find, needs_sample, direction=direction, paper=paper, weighs=True)


def _converted(name: str, value: OptionValue, default: OptionValue) -> OptionValue:
    """Convert a value to the type of the option's default."""
    kind = type(default)
    try:
        if isinstance(value, str) and kind is not str:
            value = kind(value)
        if kind is float and isinstance(value, int):
            value = float(value)
    except ValueError:
        raise FitError(f"option {name} is {value!r}, which is not of type {kind.__name__}") from None
    if type(value) is not kind:
        raise FitError(f"option {name} is {value!r}, which is not of type {kind.__name__}")
    return value
