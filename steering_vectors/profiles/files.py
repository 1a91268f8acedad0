"""Profile files: reading and atomic writing of `NAME.safetensors`, and the profile's JSON summary.

A file has the tensors `block.{l}.direction`, `block.{l}.residual_norm` and, with a gate, `gate.direction`. The metadata
key `trimtab` holds the other fields as JSON. Every fault of a file raises a `ProfileError` that names the file. Nothing
is unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as to_safetensors

from steering_vectors.errors import ProfileError
from steering_vectors.profiles.durable import write_whole
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.metadata import ProfileSummary
from steering_vectors.profiles.profile import FORMAT_VERSION, ModelIdentity, Profile

SUFFIX = ".safetensors"
MAX_FILE_BYTES = 64 * 2**20  # a hundred blocks of width 16384 take 6.5 MB; what is near this is a model
MAX_HEADER_BYTES = 2**20  # of JSON, which is parsed
METADATA_KEY = "trimtab"
REFIT = "fit the profile again"
UPGRADE = "upgrade trimtab or fit the profile again"
GATE_TENSOR = "gate.direction"
TENSOR_NAME = re.compile(r"block\.(0|[1-9][0-9]{0,5})\.(direction|residual_norm)")

TEXT, COUNT, NUMBER, OBJECT = (str,), (int,), (int, float), (dict,)
FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": COUNT,
    "name": TEXT,
    "description": TEXT,
    "method": TEXT,
    "method_options": OBJECT,
    "operator": TEXT,
    "apply_to": TEXT,
    "layering": TEXT,
    "layers": (list,),
    "unit": NUMBER,
    "max_strength": NUMBER,
    "calibration": OBJECT,
    "model": OBJECT,
    "chat_template_sha256": (str, type(None)),
    "data": OBJECT,
    "metrics": OBJECT,
    "created_at": TEXT,
    "trimtab_version": TEXT,
}
OPTIONAL_FIELDS: dict[str, tuple[type, ...]] = {"min_strength": NUMBER, "gate": OBJECT}
GATE_FIELDS = {"layer": COUNT, "threshold": NUMBER, "side": TEXT, "metrics": OBJECT}
MODEL_FIELDS = {"id": TEXT, "architecture": TEXT, "hidden_size": COUNT, "num_layers": COUNT, "fingerprint": TEXT}


def save_profile(profile: Profile, directory: str | Path) -> Path:
    """Write `directory/NAME.safetensors` atomically, replace an existing file, and return the path.

    `created_at` (UTC) and `trimtab_version` are filled in if they are empty. Residual norms are rounded to float32. The
    bytes are read back before the file is replaced. A hidden temporary file beside the target is written, fsynced and
    renamed, so a reader sees either the old file or the new one. Creates the directory. Raises ProfileError if the
    profile cannot be stored.
    """
    stamped = replace(
        profile,
        created_at=profile.created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        trimtab_version=profile.trimtab_version or installed_version(),
    )
    data = _encode(stamped)
    read_profile(data, profile.name)
    target = Path(directory) / f"{profile.name}{SUFFIX}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, data)
    except OSError as error:
        raise ProfileError(f"{target}: cannot be written ({error}); check the directory and its free space") from error
    return target


def load_profile(path: str | Path) -> Profile:
    """Read a profile file. `version` is the sha256 of the file's bytes. Never waits for what is not a regular file.
    Raises only ProfileError."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ProfileError(f"{path}: not a profile file; its name must end in {SUFFIX}")
    try:
        data = read_regular(path)
    except (OSError, ValueError) as error:  # a ValueError for a name with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ProfileError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    return read_profile(data, path.stem, str(path))


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file that is not too large, as the opened file says, whatever the path leads to later.
    Raises OSError and ProfileError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError(f"{path}: not a regular file; put a profile there, or remove it")
        if status.st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path} has {status.st_size} bytes, which is too large for a profile; is it a model?")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) != status.st_size:
        raise ProfileError(f"{path}: it changed while it was read; copy it under another name and rename it")
    return data


def read_profile(data: bytes, name: str, source: str = "") -> Profile:
    """Read a profile named `name` from the bytes of its file, which errors call `source`. Raises only ProfileError."""
    try:
        return _decode(data, name)
    except ProfileError as error:
        raise ProfileError(f"{source or f'profile {name!r}'}: {error.message}") from error


def profile_summary(profile: Profile) -> ProfileSummary:
    """Everything about a profile except its vectors, as JSON values.

    The summary holds the metadata of the file, `version`, and `residual_norms` and `direction_norms` by layer. Raises
    ProfileError if a value has no JSON form, as NaN and infinity.
    """
    metadata = _metadata(profile)
    del metadata["format_version"]
    created = {key: metadata.pop(key) for key in ("created_at", "trimtab_version")}
    norms = {layer: float(profile.directions[layer].double().norm()) for layer in profile.layers}
    summary = {
        "name": profile.name,
        "version": profile.version,
        **metadata,
        "residual_norms": {layer: float(norm) for layer, norm in sorted(profile.residual_norms.items())},
        "direction_norms": norms,
        **created,
    }
    plain: ProfileSummary = json.loads(_to_json(summary, profile.name))
    return plain


def installed_version() -> str:
    """The version of the installed distribution, or a placeholder if trimtab is not installed."""
    try:
        return importlib.metadata.version("trimtab")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0+unknown"


def _metadata(profile: Profile) -> dict[str, Any]:
    values = {field: getattr(profile, field) for field in FIELDS}
    values |= {field: dict(value) for field, value in values.items() if isinstance(value, Mapping)}
    values |= {"layers": list(profile.layers), "model": asdict(profile.model)}
    if profile.min_strength is not None:
        values["min_strength"] = profile.min_strength
    if profile.gate is not None:
        values["gate"] = {field: getattr(profile.gate, field) for field in GATE_FIELDS}
        values["gate"]["metrics"] = dict(profile.gate.metrics)
    return values


def _to_json(value: Any, name: str) -> str:
    try:
        json.dumps(value, ensure_ascii=False).encode()  # refuses half a surrogate pair
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"profile {name!r}: the metadata has no JSON form ({error}); use finite numbers, texts, lists and dicts"
        ) from error


def _encode(profile: Profile) -> bytes:
    tensors = {}
    for layer in profile.layers:  # cloned, because layers may be views of one matrix
        tensors[f"block.{layer}.direction"] = profile.directions[layer].detach().cpu().clone().contiguous()
    for layer, norm in profile.residual_norms.items():
        tensors[f"block.{layer}.residual_norm"] = torch.tensor(float(norm), dtype=torch.float32)
    if profile.gate is not None:
        tensors[GATE_TENSOR] = profile.gate.direction.detach().cpu().clone().contiguous()
    data: bytes = to_safetensors(tensors, metadata={METADATA_KEY: _to_json(_metadata(profile), profile.name)})
    return data


def _decode(data: bytes, name: str) -> Profile:
    tensors, text = _unpack(data)
    fields = _fields(text)
    if fields["name"] != name:
        raise ProfileError(f"the metadata has the name {fields['name']!r}; rename the file to {fields['name']}{SUFFIX}")
    model = ModelIdentity(**fields.pop("model"))
    directions = _directions(tensors, fields.pop("layers"), model)
    norms = _residual_norms(tensors, model)
    version = hashlib.sha256(data).hexdigest()
    gate_fields, gate = fields.pop("gate", None), None
    try:
        if (gate_fields is None) != (GATE_TENSOR not in tensors):
            raise ProfileError("only one of the metadata and the tensors has a gate")
        if gate_fields is not None:
            gate = Gate(direction=_tensor(tensors, GATE_TENSOR, [model.hidden_size]), **gate_fields)
        return Profile(model=model, directions=directions, residual_norms=norms, version=version, gate=gate, **fields)
    except ProfileError as error:
        raise ProfileError(f"{error.message}; {REFIT}") from error


def _unpack(data: bytes) -> tuple[dict[str, Any], str]:
    """Split a safetensors file into its tensors (dtype, shape and bytes by name) and the text of the metadata key."""
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        reason = f"its header has {length} bytes, of at most {MAX_HEADER_BYTES}"
        raise ProfileError(f"not a complete safetensors file ({reason}); copy it again, or {REFIT}")
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + length])
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ProfileError(f"not a complete safetensors file ({error}); copy it again, or {REFIT}") from error
    metadata = header.get("__metadata__") or {}
    if METADATA_KEY not in metadata:
        raise ProfileError(f"not a profile: the metadata of this safetensors file has no key {METADATA_KEY!r}; {REFIT}")
    if unknown := sorted(set(metadata) - {METADATA_KEY}):
        raise ProfileError(f"the metadata has the unknown key {unknown[0]!r}; {UPGRADE}")
    for name in sorted(tensors):
        if name != GATE_TENSOR and not TENSOR_NAME.fullmatch(name):
            raise ProfileError(f"the file has the unknown tensor {name!r}; {UPGRADE}")
    return tensors, metadata[METADATA_KEY]


def _fields(text: str) -> dict[str, Any]:
    """The metadata as a dict with exactly the fields of a profile, each of the right type."""
    try:
        fields = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_integer)
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"the metadata is not valid JSON ({error}); {REFIT}") from error
    if not isinstance(fields, dict):
        raise ProfileError(f"the metadata is not a JSON object; {REFIT}")
    if (version := fields.get("format_version", FORMAT_VERSION)) != FORMAT_VERSION:
        raise ProfileError(f"the format version is {version!r}; this trimtab reads {FORMAT_VERSION}; {UPGRADE}")
    optional = {field: types for field, types in OPTIONAL_FIELDS.items() if field in fields}
    _check_types(fields, FIELDS | optional, "")
    _check_types(fields["model"], MODEL_FIELDS, "model.")
    if "gate" in fields:
        _check_types(fields["gate"], GATE_FIELDS, "gate.")
    return fields


def _check_types(fields: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], prefix: str) -> None:
    if missing := [field for field in types if field not in fields]:
        raise ProfileError(f"the metadata has no field {prefix + missing[0]!r}; {REFIT}")
    if unknown := sorted(set(fields) - set(types)):
        raise ProfileError(f"the metadata has the unknown field {prefix + unknown[0]!r}; {UPGRADE}")
    for field, allowed in types.items():
        if type(fields[field]) not in allowed:
            wanted = " or ".join(one.__name__ for one in allowed)
            found = type(fields[field]).__name__
            raise ProfileError(f"{prefix + field!r} in the metadata has type {found}, not {wanted}; {REFIT}")


def _number(text: str) -> float:
    """A finite float. Python's JSON also accepts NaN, Infinity and 1e999."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"{text[:18]}… is too large")
    return int(text)


def _directions(tensors: Mapping[str, Any], layers: list[Any], model: ModelIdentity) -> dict[int, torch.Tensor]:
    present = _layers_with("direction", tensors)
    if any(type(layer) is not int for layer in layers) or layers != present:
        raise ProfileError(f"'layers' in the metadata is {layers}, but the directions have layers {present}; {REFIT}")
    if model.hidden_size < 1 or model.num_layers < 1:
        raise ProfileError(f"its model has hidden size {model.hidden_size} and {model.num_layers} blocks; {REFIT}")
    return {layer: _tensor(tensors, f"block.{layer}.direction", [model.hidden_size]) for layer in present}


def _residual_norms(tensors: Mapping[str, Any], model: ModelIdentity) -> dict[int, float]:
    norms = {}
    for layer in _layers_with("residual_norm", tensors):
        name = f"block.{layer}.residual_norm"
        norms[layer] = float(_tensor(tensors, name, []))
        if layer >= model.num_layers:
            raise ProfileError(f"{name!r} is out of range; the model has blocks 0 to {model.num_layers - 1}; {REFIT}")
        if not 0 <= norms[layer] < math.inf:
            raise ProfileError(f"{name!r} is {norms[layer]}, not a finite norm; {REFIT}")
    return norms


def _layers_with(kind: str, tensors: Mapping[str, Any]) -> list[int]:
    return sorted(int(match[1]) for match in map(TENSOR_NAME.fullmatch, tensors) if match and match[2] == kind)


def _tensor(tensors: Mapping[str, Any], name: str, shape: list[int]) -> torch.Tensor:
    entry = tensors[name]
    if entry["dtype"] != "F32" or list(entry["shape"]) != shape:
        raise ProfileError(
            f"tensor {name!r} is {entry['dtype']} of shape {list(entry['shape'])}, not F32 of shape {shape}; {REFIT}"
        )
    return torch.frombuffer(bytearray(entry["data"]), dtype=torch.float32).reshape(shape)
