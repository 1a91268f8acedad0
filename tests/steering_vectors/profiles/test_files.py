"""Profile files: written files can be read, and every unreadable file raises a ProfileError with the reason."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as to_safetensors

from steering_vectors.errors import ProfileError
from steering_vectors.profiles.files import (
    installed_version,
    load_profile,
    profile_summary,
    read_profile,
    save_profile,
)
from steering_vectors.profiles.gate import Gate
from steering_vectors.profiles.profile import ModelIdentity, Profile

HIDDEN = 6
MODEL = ModelIdentity(
    id="tiny", architecture="LlamaForCausalLM", hidden_size=HIDDEN, num_layers=4, fingerprint="f" * 64
)


def make_profile(**changes: Any) -> Profile:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, HIDDEN, generator=generator)
    fields: dict[str, Any] = {
        "name": "warm",
        "model": MODEL,
        "directions": {2: matrix[1], 0: matrix[0]},
        "method": "mean-diff",
        "unit": 1.5,
        "description": "wärmer ☀",
        "method_options": {"tokens": "response"},
        "calibration": {"kl_budget": 0.1, "kl_at_1": 0.0998},
        "chat_template_sha256": "a" * 64,
        "data": {"rows": 20, "sha256": "b" * 64},
        "metrics": {"accuracy": {"0": 0.5}},
        "residual_norms": {0: 2.5, 2: 3.25},
    }
    return Profile(**(fields | changes))


def stored(tmp_path: Path, **changes: Any) -> bytes:
    return save_profile(make_profile(**changes), tmp_path).read_bytes()


def altered(data: bytes, /, *, tensors: dict[str, torch.Tensor | None] | None = None, **fields: Any) -> bytes:
    """The file with other tensors (None removes one) and other metadata fields (... removes one)."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = json.loads(header["__metadata__"]["trimtab"]) | fields
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    held = load_tensors(data) | (tensors or {})
    kept = {name: tensor for name, tensor in held.items() if tensor is not None}
    return to_safetensors(kept, metadata={"trimtab": json.dumps(metadata)})


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return stored(tmp_path)


def message_of(data: bytes) -> str:
    with pytest.raises(ProfileError) as caught:
        read_profile(data, "warm")
    return caught.value.message


def test_a_profile_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    profile = make_profile(created_at="2024-01-02T03:04:05+00:00", trimtab_version="1.2.3")
    loaded = load_profile(save_profile(profile, tmp_path))
    assert loaded.layers == (0, 2)
    assert all(torch.equal(loaded.directions[layer], profile.directions[layer]) for layer in (0, 2))
    blank = {"directions": {0: torch.zeros(HIDDEN)}, "version": ""}
    assert [getattr(replace(loaded, **blank), f) for f in Profile.__dataclass_fields__ if f != "directions"] == [
        getattr(replace(profile, **blank), f) for f in Profile.__dataclass_fields__ if f != "directions"
    ]


@pytest.mark.slow
@settings(max_examples=40)
@given(
    vectors=st.dictionaries(
        st.integers(0, 3),
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=HIDDEN, max_size=HIDDEN),
        min_size=1,
    ),
    unit=st.floats(min_value=1e-300, max_value=3e38),
    description=st.text(),
)
def test_any_valid_profile_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, vectors: dict[int, list[float]], unit: float, description: str
) -> None:
    directions = {layer: torch.tensor(values, dtype=torch.float32) for layer, values in vectors.items()}
    profile = make_profile(directions=directions, residual_norms={}, unit=unit, description=description)
    loaded = load_profile(save_profile(profile, tmp_path_factory.mktemp("profiles")))
    assert {layer: d.tolist() for layer, d in loaded.directions.items()} == vectors
    assert (loaded.unit, loaded.description) == (unit, description)


@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_is_another_version(
    tmp_path_factory: pytest.TempPathFactory, place: float, value: int
) -> None:
    data = stored(tmp_path_factory.getbasetemp(), created_at="2024-01-02T03:04:05+00:00", trimtab_version="1.2.3")
    damaged = bytearray(data)
    damaged[int(place * len(damaged))] = value
    try:
        found = read_profile(bytes(damaged), "warm")
    except ProfileError:
        return
    assert found.version == hashlib.sha256(damaged).hexdigest()  # different bytes give a different version
    assert all(direction.isfinite().all() for direction in found.directions.values())
    assert found.model.hidden_size == HIDDEN


def test_the_version_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    path = save_profile(make_profile(), tmp_path)
    assert load_profile(path).version == hashlib.sha256(path.read_bytes()).hexdigest()


def test_saving_fills_the_time_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    created = datetime.fromisoformat(load_profile(save_profile(make_profile(), tmp_path)).created_at)
    assert before <= created <= datetime.now(UTC)


def test_saving_fills_the_version_of_trimtab(tmp_path: Path) -> None:
    assert load_profile(save_profile(make_profile(), tmp_path)).trimtab_version


def test_the_version_of_trimtab_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed_version() == importlib.metadata.version("trimtab")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert installed_version() == "0.0.0+unknown"


def test_saving_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_profile(make_profile(unit=1.0), tmp_path)
    save_profile(make_profile(unit=2.0), tmp_path)
    assert names_in(tmp_path) == ["warm.safetensors"]
    assert load_profile(tmp_path / "warm.safetensors").unit == 2.0


def test_a_failed_rename_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "warm.safetensors").mkdir()
    with pytest.raises(ProfileError, match=r"warm\.safetensors: cannot be written"):
        save_profile(make_profile(), tmp_path)
    assert names_in(tmp_path) == ["warm.safetensors"]


def test_a_profile_whose_metadata_has_no_json_form_is_not_stored(tmp_path: Path) -> None:
    for metrics in ({"accuracy": float("nan")}, {"note": "\ud800"}):
        with pytest.raises(ProfileError, match=r"^profile 'warm': the metadata has no JSON form .* use finite numbers"):
            save_profile(make_profile(metrics=metrics), tmp_path)
    assert names_in(tmp_path) == []


def test_a_residual_norm_beyond_float32_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"'block\.0\.residual_norm' is inf, not a finite norm"):
        save_profile(make_profile(residual_norms={0: 1e300}), tmp_path)


def test_saving_creates_the_directory(tmp_path: Path) -> None:
    assert save_profile(make_profile(), tmp_path / "a" / "b") == tmp_path / "a" / "b" / "warm.safetensors"


def test_a_missing_file_is_a_profile_error(tmp_path: Path) -> None:
    path = tmp_path / "warm.safetensors"
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == (
        f"{path}: cannot be read (No such file or directory); check the path and its permissions"
    )


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "warm.pt"
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == f"{path}: not a profile file; its name must end in .safetensors"


def test_the_stem_must_be_the_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "cold.safetensors"
    path.write_bytes(data)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value) == f"{path}: the metadata has the name 'warm'; rename the file to warm.safetensors"


def test_a_name_may_hold_dots(tmp_path: Path) -> None:
    assert load_profile(save_profile(make_profile(name="warm.v2"), tmp_path)).name == "warm.v2"


@pytest.mark.parametrize("place", range(8))
def test_a_changed_length_of_the_header_is_refused(data: bytes, place: int) -> None:
    damaged = bytearray(data)
    damaged[place] ^= 0x10
    assert "not a complete safetensors file (" in message_of(bytes(damaged))


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_truncated_file_names_the_remedy(tmp_path: Path, data: bytes, cut: int) -> None:
    path = tmp_path / "warm.safetensors"
    path.write_bytes(data[:cut])
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}: not a complete safetensors file (")
    assert str(caught.value).endswith("; copy it again, or fit the profile again")


def test_a_safetensors_file_of_another_kind_is_no_profile() -> None:
    assert message_of(to_safetensors({"weight": torch.ones(2)})) == (
        "profile 'warm': not a profile: the metadata of this safetensors file has no key 'trimtab'; "
        "fit the profile again"
    )


def test_a_nan_is_refused(data: bytes) -> None:
    assert message_of(altered(data, tensors={"block.2.direction": torch.full((HIDDEN,), torch.nan)})) == (
        "profile 'warm': profile 'warm': the direction at layer 2 has a NaN or infinite entry; fit the profile again"
    )


def test_a_wrong_size_is_refused(data: bytes) -> None:
    assert message_of(altered(data, tensors={"block.2.direction": torch.ones(HIDDEN + 1)})) == (
        "profile 'warm': tensor 'block.2.direction' is F32 of shape [7], not F32 of shape [6]; fit the profile again"
    )


def test_a_wrong_dtype_is_refused(data: bytes) -> None:
    assert message_of(altered(data, tensors={"block.0.direction": torch.ones(HIDDEN, dtype=torch.bfloat16)})) == (
        "profile 'warm': tensor 'block.0.direction' is BF16 of shape [6], not F32 of shape [6]; fit the profile again"
    )


@pytest.mark.parametrize("layers", [[2, 0], [0], [0, 1, 2], [0, 2, 2], [0.0, 2], [False, 2], ["0", 2]])
def test_layers_must_be_those_of_the_tensors_ascending(data: bytes, layers: list[Any]) -> None:
    assert message_of(altered(data, layers=layers)) == (
        f"profile 'warm': 'layers' in the metadata is {layers}, but the directions have layers [0, 2]; "
        "fit the profile again"
    )


def test_a_layer_beyond_the_model_is_refused(data: bytes) -> None:
    beyond = altered(data, tensors={"block.4.direction": torch.ones(HIDDEN)}, layers=[0, 2, 4])
    assert "layer 4 is out of range; the model has blocks 0 to 3" in message_of(beyond)


@pytest.mark.parametrize("name", ["block.01.direction", "block.-1.direction", "block.1.bias", "weight", "block.1"])
def test_an_unknown_tensor_is_refused(data: bytes, name: str) -> None:
    assert message_of(altered(data, tensors={name: torch.ones(HIDDEN)})) == (
        f"profile 'warm': the file has the unknown tensor {name!r}; upgrade trimtab or fit the profile again"
    )


@pytest.mark.parametrize("norm", [-1.0, -1e-30, float("inf"), float("nan")])
def test_an_invalid_residual_norm_is_refused(data: bytes, norm: float) -> None:
    bad = altered(data, tensors={"block.2.residual_norm": torch.tensor(norm)})
    assert re.fullmatch(
        r"profile 'warm': 'block\.2\.residual_norm' is \S+, not a finite norm; fit the profile again", message_of(bad)
    )


@pytest.mark.parametrize("layer", [4, 5, 999])
def test_a_residual_norm_beyond_the_model_is_refused(data: bytes, layer: int) -> None:
    beyond = altered(data, tensors={f"block.{layer}.residual_norm": torch.tensor(1.0)})
    assert message_of(beyond) == (
        f"profile 'warm': 'block.{layer}.residual_norm' is out of range; the model has blocks 0 to 3; "
        "fit the profile again"
    )
    last = altered(data, tensors={"block.3.residual_norm": torch.tensor(0.0)})
    assert read_profile(last, "warm").residual_norms == {0: 2.5, 2: 3.25, 3: 0.0}


@pytest.mark.parametrize("low", [None, -0.4])
def test_the_lower_end_of_the_safe_range_comes_back(tmp_path: Path, low: float | None) -> None:
    stored = load_profile(save_profile(make_profile(max_strength=1.7, min_strength=low), tmp_path))
    assert (stored.min_strength, stored.max_strength) == (low, 1.7)
    assert profile_summary(stored).get("min_strength") == low


def test_a_gate_comes_back_as_it_was(tmp_path: Path) -> None:
    gate = Gate(1, torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)), 0.25, "below", {"f1_heldout": 0.9})
    found = load_profile(save_profile(make_profile(gate=gate), tmp_path)).gate
    assert found is not None
    assert torch.equal(found.direction, gate.direction)
    assert (found.layer, found.threshold, found.side, found.metrics) == (1, 0.25, "below", {"f1_heldout": 0.9})


def test_a_broken_gate_is_refused(data: bytes) -> None:
    stated = {"layer": 1, "threshold": 0.5, "side": "above", "metrics": {}}
    vector = {"gate.direction": torch.ones(HIDDEN)}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (vector, {}, "only one of the metadata and the tensors has a gate"),
        ({}, {"gate": stated}, "only one of the metadata and the tensors has a gate"),
        ({"gate.2.weight": torch.ones(HIDDEN)}, {}, "unknown tensor 'gate.2.weight'"),
        (vector, {"gate": {**stated, "side": "left"}}, "the gate's side is 'left'"),
        (vector, {"gate": {**stated, "layer": 99}}, "gate's layer 99 is out of range"),
        (vector, {"gate": {**stated, "more": 1}}, "unknown field 'gate.more'"),
        (vector, {"gate": [1]}, "'gate' in the metadata has type list"),
        ({"gate.direction": torch.zeros(HIDDEN)}, {"gate": stated}, "the gate's direction is zero"),
        ({"gate.direction": torch.ones(HIDDEN + 1)}, {"gate": stated}, "not F32 of shape"),
    ]
    for tensors, fields, message in cases:
        assert message in message_of(altered(data, tensors=tensors, **fields))


def test_a_profile_without_directions_is_refused(data: bytes) -> None:
    bare = altered(data, tensors={"block.0.direction": None, "block.2.direction": None}, layers=[])
    assert "has no direction" in message_of(bare)


@pytest.mark.parametrize("field", ["name", "operator", "unit", "calibration", "created_at", "format_version"])
def test_a_missing_field_is_named(data: bytes, field: str) -> None:
    assert message_of(altered(data, **{field: ...})) == (
        f"profile 'warm': the metadata has no field {field!r}; fit the profile again"
    )


def test_an_unknown_field_is_named(data: bytes) -> None:
    assert message_of(altered(data, colour="red")) == (
        "profile 'warm': the metadata has the unknown field 'colour'; upgrade trimtab or fit the profile again"
    )


def test_an_unknown_metadata_key_is_named() -> None:
    other = to_safetensors({"block.0.direction": torch.ones(HIDDEN)}, metadata={"trimtab": "{}", "format": "pt"})
    assert message_of(other) == (
        "profile 'warm': the metadata has the unknown key 'format'; upgrade trimtab or fit the profile again"
    )


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("chat_template_sha256", 3, "int"),
        ("name", 3, "int"),
        ("unit", "1", "str"),
        ("unit", True, "bool"),
        ("data", [], "list"),
        ("layers", None, "NoneType"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(data: bytes, field: str, value: Any, found: str) -> None:
    assert f"{field!r} in the metadata has type {found}, not " in message_of(altered(data, **{field: value}))


@pytest.mark.parametrize(
    ("field", "wanted"), [("name", "str"), ("unit", "int or float"), ("chat_template_sha256", "str or NoneType")]
)
def test_the_types_that_a_field_may_have_are_named(data: bytes, field: str, wanted: str) -> None:
    assert message_of(altered(data, **{field: []})) == (
        f"profile 'warm': {field!r} in the metadata has type list, not {wanted}; fit the profile again"
    )


@pytest.mark.parametrize(("hidden", "blocks"), [(0, 4), (HIDDEN, 0)])
def test_a_model_without_hidden_states_or_blocks_is_refused(data: bytes, hidden: int, blocks: int) -> None:
    model = asdict(MODEL) | {"hidden_size": hidden, "num_layers": blocks}
    assert message_of(altered(data, model=model)) == (
        f"profile 'warm': its model has hidden size {hidden} and {blocks} blocks; fit the profile again"
    )


def test_a_model_of_one_block_with_one_entry_is_read(tmp_path: Path) -> None:
    model = replace(MODEL, hidden_size=1, num_layers=1)
    profile = make_profile(model=model, directions={0: torch.ones(1)}, residual_norms={})
    assert load_profile(save_profile(profile, tmp_path)).model == model


def test_the_fields_of_the_model_are_checked(data: bytes) -> None:
    model = {"id": "tiny", "architecture": "x", "hidden_size": "6", "num_layers": 4, "fingerprint": "f"}
    assert "'model.hidden_size' in the metadata has type str, not int" in message_of(altered(data, model=model))


def test_a_newer_format_asks_for_an_upgrade(data: bytes) -> None:
    assert message_of(altered(data, format_version=2, colour="red")) == (
        "profile 'warm': the format version is 2; this trimtab reads 1; upgrade trimtab or fit the profile again"
    )


def test_an_operator_that_does_not_exist_is_refused(data: bytes) -> None:
    assert "operator is 'multiply', not one of add, ablate" in message_of(altered(data, operator="multiply"))


def test_norms_are_stored_in_float32_whatever_the_default_dtype(tmp_path: Path) -> None:
    profile = make_profile(residual_norms={0: 1.5})
    torch.set_default_dtype(torch.float64)
    try:
        path = save_profile(profile, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert load_tensors(path.read_bytes())["block.0.residual_norm"].dtype == torch.float32


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 400])
def test_a_number_that_is_not_finite_is_refused(data: bytes, text: str) -> None:
    bad = _with_metadata_text(data, lambda metadata: metadata.replace('"unit": 1.5', f'"unit": {text}'))
    fault = f"{'9' * 18}… is too large" if text.isdecimal() else f"{text} is not a finite number"
    assert message_of(bad) == f"profile 'warm': the metadata is not valid JSON ({fault}); fit the profile again"


@pytest.mark.parametrize(("digits", "read"), [(18, True), (19, False), (180, False)])
def test_integers_of_up_to_18_digits_are_read(data: bytes, digits: int, read: bool) -> None:
    large = altered(data, data={"rows": int("9" * digits)})
    if read:
        assert read_profile(large, "warm").data == {"rows": int("9" * digits)}
    else:
        assert message_of(large) == (
            f"profile 'warm': the metadata is not valid JSON ({'9' * 18}… is too large); fit the profile again"
        )


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 5000, '{"name": "\\ud800"}'])
def test_metadata_that_is_no_json_object_is_refused(data: bytes, text: str) -> None:
    assert "the metadata is not " in message_of(_with_metadata_text(data, lambda _: text))


def test_the_summary_is_plain_json(tmp_path: Path) -> None:
    profile = load_profile(save_profile(make_profile(), tmp_path))
    summary = profile_summary(profile)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary)[:2] == ["name", "version"]
    assert summary["layers"] == [0, 2]
    assert summary["model"]["hidden_size"] == HIDDEN
    assert summary["residual_norms"] == {"0": 2.5, "2": 3.25}
    assert summary["direction_norms"]["2"] == pytest.approx(float(profile.directions[2].norm()))


def test_no_summary_holds_a_number_that_is_not_finite() -> None:
    with pytest.raises(ProfileError, match=r"^profile 'warm': the metadata has no JSON form \(.*\); use finite"):
        profile_summary(make_profile(metrics={"loss": float("inf")}))


def _with_metadata_text(data: bytes, change: Any) -> bytes:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return to_safetensors(load_tensors(data), metadata={"trimtab": change(header["__metadata__"]["trimtab"])})
