"""The profile: named directions in a model's residual stream, with the metadata of their fit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from steering_vectors.errors import ProfileError, ProfileMismatch, SteeringError
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.metadata import Calibration, DataRecord, MethodOptions, Metrics

FORMAT_VERSION = 1
DEFAULT_MAX_STRENGTH = 2.0
LARGEST = torch.finfo(torch.float32).max
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
NAME_RULE = "use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"

Operator = Literal["add", "ablate"]
ApplyTo = Literal["generated", "all"]
Layering = Literal["independent", "incremental"]

CHOICES = {"operator": get_args(Operator), "apply_to": get_args(ApplyTo), "layering": get_args(Layering)}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that a profile was fitted on. `fingerprint` is a sha256 over shapes and a fixed sample of weights."""

    id: str
    architecture: str
    hidden_size: int
    num_layers: int
    fingerprint: str


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Profile:
    """One steering profile.

    `directions[l]` is float32 `[hidden_size]`. Strength α shifts block l by α · unit · d_l. With
    `layering="incremental"`, the direction at the profile's previous layer is subtracted from d_l first; stored
    directions are never differenced. `version` is the sha256 of the file's bytes, empty until the profile is stored.
    With a `gate`, a server steers only the prompts that open it. `min_strength` is None where the safe range is
    symmetric, ±`max_strength`.
    """

    name: str
    model: ModelIdentity
    directions: Mapping[int, torch.Tensor]
    method: str
    unit: float = 1.0
    operator: Operator = "add"
    apply_to: ApplyTo = "generated"
    layering: Layering = "independent"
    max_strength: float = DEFAULT_MAX_STRENGTH
    min_strength: float | None = None
    description: str = ""
    method_options: MethodOptions = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    chat_template_sha256: str | None = None
    data: DataRecord = field(default_factory=DataRecord)
    metrics: Metrics = field(default_factory=Metrics)
    residual_norms: Mapping[int, float] = field(default_factory=dict)
    created_at: str = ""
    trimtab_version: str = ""
    format_version: int = FORMAT_VERSION
    version: str = ""
    gate: Gate | None = None

    def __post_init__(self) -> None:
        self._check_fields()
        self._check_tensors()

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a direction, ascending."""
        return tuple(sorted(self.directions))

    @property
    def safe_range(self) -> tuple[float, float]:
        """The least and the largest safe strength."""
        return -self.max_strength if self.min_strength is None else self.min_strength, self.max_strength

    def safe_limit(self, strength: float) -> float:
        """The largest safe magnitude of strengths with this one's sign."""
        low, high = self.safe_range
        return -low if strength < 0 else high

    def injected(self, layers: Iterable[int] | None = None) -> dict[int, torch.Tensor]:
        """The vectors that strength 1 injects, before multiplication by `unit`: float32 `[hidden_size]` per layer.

        `layers` restricts the profile to a subset. Incremental layering is differenced over that subset, ascending.
        Directions to ablate are never differenced. Raises SteeringError for a layer that the profile does not have.
        """
        chosen = self.layers if layers is None else tuple(sorted(set(layers)))
        missing = [layer for layer in chosen if layer not in self.directions]
        if missing or not chosen:
            raise SteeringError(
                f"profile {self.name!r} has no direction at layer {missing[0]}; it has layers {list(self.layers)}"
                if missing
                else f"profile {self.name!r}: the list of layers is empty; leave it out to use all layers",
                param="layers",
            )
        if self.layering == "independent" or self.operator == "ablate":
            return {layer: self.directions[layer] for layer in chosen}
        steps, previous = {}, torch.zeros(self.model.hidden_size)
        for layer in chosen:
            steps[layer] = self.directions[layer] - previous
            previous = self.directions[layer]
        return steps

    def shift_norms(self) -> dict[int, float]:
        """The norm of the shift at strength 1, by block."""
        return {layer: self.unit * float(shift.norm()) for layer, shift in self.injected().items()}

    def content_digest(self) -> str:
        """sha256 of the profile's directions, unit and operator, for a profile without a file and a version."""
        digest = hashlib.sha256(f"{self.operator} {self.layering} {self.unit!r}".encode())
        for layer in self.layers:
            digest.update(str(layer).encode())
            digest.update(self.directions[layer].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, identity: ModelIdentity, *, allow_mismatch: bool = False) -> None:
        """Raise ProfileMismatch unless the profile was fitted on this model.

        `allow_mismatch` accepts another checkpoint of the same shape. A different shape is always an error.
        """
        ours = self.model
        if (ours.hidden_size, ours.num_layers) != (identity.hidden_size, identity.num_layers):
            raise ProfileMismatch(
                f"profile {self.name!r} was fitted on {ours.id!r} (hidden size {ours.hidden_size}, {ours.num_layers} "
                f"blocks); the model here is {identity.id!r} (hidden size {identity.hidden_size}, "
                f"{identity.num_layers} blocks). Fit it again on this model."
            )
        if ours.fingerprint != identity.fingerprint and not allow_mismatch:
            raise ProfileMismatch(
                f"profile {self.name!r} was fitted on {ours.id!r}, whose weights differ from {identity.id!r}'s. "
                "Fit it again on this model, or set allow_model_mismatch to use it anyway."
            )

    def _fault(self, message: str) -> ProfileError:
        return ProfileError(f"profile {self.name!r}: {message}")

    def _check_fields(self) -> None:
        if not isinstance(self.name, str) or not NAME_PATTERN.fullmatch(self.name):
            raise ProfileError(f"{self.name!r} is not a profile name; {NAME_RULE}")
        if self.format_version != FORMAT_VERSION:
            raise ProfileError(
                f"profile {self.name!r} has format version {self.format_version}; this trimtab reads {FORMAT_VERSION}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise self._fault(f"{name} is {getattr(self, name)!r}, not one of {', '.join(choices)}")
        for name in ("unit", "max_strength"):
            if not _is_size(value := getattr(self, name)):
                raise self._fault(f"{name} must be a positive finite number, not {value!r}")
        low = self.min_strength
        if low is not None and (isinstance(low, bool) or not isinstance(low, int | float) or not _is_size(-low)):
            raise self._fault(f"min_strength must be a negative finite number, not {low!r}")

    def _check_tensors(self) -> None:
        size, last = self.model.hidden_size, self.model.num_layers - 1
        if not self.directions:
            raise ProfileError(f"profile {self.name!r} has no direction")
        for layer, direction in self.directions.items():
            if isinstance(layer, bool) or not 0 <= layer <= last:
                raise self._fault(f"layer {layer} is out of range; the model has blocks 0 to {last}")
            if tuple(direction.shape) != (size,):
                shape = list(direction.shape)
                raise self._fault(
                    f"the direction at layer {layer} has shape {shape}, the model's hidden size is {size}"
                )
            if direction.dtype != torch.float32:
                raise self._fault(f"the direction at layer {layer} is not float32")
            if not bool(torch.isfinite(direction).all()):
                raise self._fault(f"the direction at layer {layer} has a NaN or infinite entry")
        if self.gate is not None:
            if not 0 <= self.gate.layer <= last:
                place = f"its gate's layer {self.gate.layer}"
                raise self._fault(f"{place} is out of range; the model has blocks 0 to {last}")
            if (entries := len(self.gate.direction)) != size:
                raise self._fault(f"its gate's direction has {entries} entries, the model's hidden size is {size}")


def _is_size(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST
