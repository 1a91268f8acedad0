"""Whether a model's weights are packed: where that is expected to be faster and agrees with the plain model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.fused_blocks import could_fuse
from steering_vectors.runtime.cpu.packing import UNPACKED, is_packed, pack, packs, unpack

MACHINES = ("x86_64", "amd64")  # where it was measured


def pack_if_faster(language_model: LanguageModel) -> str:
    """Pack a model's weights unless they stay plain for a reason; returns which, and why, for the log.

    In bfloat16 a packed product is several times as fast. In float32 one of few rows takes two thirds of the time, and
    weights are packed for fused blocks only. If packing fails, the model is as before. `packing.unpack` is the way
    back, which training needs.
    """
    model = language_model.model
    if is_packed(model):
        return "packed before"
    if reason := _reason_for_plain(language_model):
        return f"plain: {reason}"
    try:
        sizes = pack(model)
    except ModelError as error:
        return f"plain: {error.message.removesuffix(f'; {UNPACKED}')}"
    if not sizes:
        return "plain: the model has no linear layers that can be packed"
    joined = f"{sum(sizes)} linear layers in {len(sizes)} products"
    if language_model.dtype == torch.float32:
        return f"packed: {joined}, for fused blocks"
    return f"packed: {joined}, which are faster in {_dtype(language_model)}"


@contextmanager
def packed(language_model: LanguageModel) -> Iterator[None]:
    """Inside, the weights are packed where that is faster, for inference only; afterwards they are as before."""
    before = is_packed(language_model.model)
    pack_if_faster(language_model)
    try:
        yield
    finally:
        if not before and is_packed(language_model.model):
            unpack(language_model.model)


def _reason_for_plain(language_model: LanguageModel) -> str | None:
    if language_model.device.type != "cpu":
        return f"the model is on {language_model.device}"
    if platform.machine().lower() not in MACHINES:
        return f"packed weights are not known to be faster on {platform.machine()}"
    if not packs(language_model.model):
        return f"oneDNN packs no weights in {_dtype(language_model)} here"
    if language_model.dtype == torch.float32 and not could_fuse(language_model.blocks):
        return "in float32 packed weights are faster in fused blocks only, which this model cannot have here"
    return None


def _dtype(language_model: LanguageModel) -> str:
    return str(language_model.dtype).removeprefix("torch.")
