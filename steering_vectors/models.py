"""Loading a causal language model of any architecture and finding its decoder blocks.

Owns what is needed to read or write a model's residual stream: the model, its tokenizer, its blocks and its identity.
Knows nothing of profiles' contents, methods or serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from steering_vectors.errors import ModelError
from steering_vectors.fingerprint import fingerprint_checkpoint, fingerprint_parameters
from steering_vectors.hooks import trace_calls
from steering_vectors.profile import ModelIdentity

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent / "demo" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """A loaded model. `blocks[l]` is decoder block l; its output is the residual stream `[batch, positions, hidden]`."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    blocks: tuple[nn.Module, ...]
    identity: ModelIdentity

    @property
    def hidden_size(self) -> int:
        return self.identity.hidden_size

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def load_model(model: str, *, dtype: str = "auto", device: str = "cpu") -> LanguageModel:
    """Load `demo`, a directory or a hub id; only safetensors weights, no remote code.

    `dtype` is auto (the checkpoint's), float32, bfloat16 or float16. Raises ModelError with the remedy.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    source = str(DEMO_DIRECTORY) if model == DEMO else model
    tokenizer = _load_tokenizer(source)
    try:
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model {model!r} cannot be loaded: {error}") from error
    network = network.to(device).eval().requires_grad_(False)
    return wrap_model(network, tokenizer, name=_served_name(model))


def wrap_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None
) -> LanguageModel:
    """A LanguageModel around a model that is loaded already; its blocks are found by a dry run."""
    blocks = find_blocks(model)
    identity = ModelIdentity(
        id=name or _served_name(str(model.config.name_or_path or type(model).__name__)),
        architecture=type(model).__name__,
        hidden_size=hidden_size_of(model),
        num_layers=len(blocks),
        fingerprint=_fingerprint(model),
    )
    return LanguageModel(name or identity.id, model, tokenizer, blocks, identity)


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of the residual stream. OPT and others embed into another width first, so the blocks' input decides."""
    config = model.config.get_text_config()
    return int(config.hidden_size)


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Decoder blocks, structurally: the longest ModuleList whose members each run once per forward, in order, and each
    return a residual stream `[batch, positions, hidden]` (as a tensor, or first in a tuple).

    Raises ModelError if there is none.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    members = [(f"{name}.{i}", member) for name, modules in lists for i, member in enumerate(modules)]
    shape = (1, 3, hidden_size_of(model))
    ids = torch.arange(1, 4, device=model.device).unsqueeze(0)

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False)

    calls = trace_calls(members, run)
    candidates = [(name, modules) for name, modules in lists if _runs_in_order(name, len(modules), calls, shape)]
    if not candidates:
        raise ModelError(
            f"no decoder blocks were found in {type(model).__name__}: no list of modules runs once per forward pass, "
            "in order, each returning the residual stream. This architecture cannot be steered yet."
        )
    _, blocks = max(candidates, key=lambda candidate: len(candidate[1]))
    return tuple(blocks)


def _runs_in_order(
    name: str, length: int, calls: list[tuple[str, tuple[int, ...] | None]], shape: tuple[int, ...]
) -> bool:
    prefix = f"{name}."
    ours = [call for call in calls if call[0].startswith(prefix) and "." not in call[0][len(prefix) :]]
    return length > 0 and ours == [(f"{name}.{i}", shape) for i in range(length)]


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    directory = Path(source)
    if directory.is_dir() and not any(
        (directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    ):
        raise ModelError(
            f"{source} holds no tokenizer (tokenizer.json, tokenizer.model or tokenizer_config.json): "
            "copy the model's tokenizer files into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {source!r} cannot be loaded: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer of {source!r} is not a transformers tokenizer")
    return tokenizer


def _served_name(model: str) -> str:
    """The hub id, `demo`, or a directory's last component."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _fingerprint(model: PreTrainedModel) -> str:
    directory = _checkpoint_directory(str(model.config.name_or_path or ""))
    if directory is not None and any(directory.glob("*.safetensors")):
        return fingerprint_checkpoint(directory, model.config)
    return fingerprint_parameters(model)


def _checkpoint_directory(source: str) -> Path | None:
    """Where a model's files lie: a directory itself, or the snapshot of a hub id that was downloaded already."""
    if not source:
        return None
    if Path(source).is_dir():
        return Path(source)
    found = cached_file(source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return Path(found).parent if found else None


