"""Loading a causal language model of any architecture and finding its decoder blocks.

Owns what is needed to read or write a model's residual stream: the model, its tokenizer, its blocks and its identity.
Knows nothing of profiles' contents, methods or serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file

from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.adapters import merge_adapter
from steering_vectors.models.fingerprint import fingerprint_checkpoint, fingerprint_parameters
from steering_vectors.models.hooks import Call, trace_calls
from steering_vectors.profiles.profile import ModelIdentity

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
DRY_RUN_TOKENS = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """A loaded model. The output of `blocks[l]` is the residual stream after block l, `[batch, positions, hidden]`."""

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
        return cast(torch.dtype, self.model.dtype)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


def load_model(
    model: str, *, dtype: str = "auto", device: str = "cpu", adapter: Path | None = None, parted: bool = False
) -> LanguageModel:
    """Load `demo`, a directory or a hub id; only safetensors weights, no remote code.

    `dtype` is auto (the checkpoint's), float32, bfloat16 or float16. An `adapter` is a folder in peft's format, merged
    into the weights: the result is another model, whose profiles are its own. `parted`: each process of torch's process
    group holds a part of the weights, and all run the same passes. Raises ModelError with the remedy.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    source = str(DEMO_DIRECTORY) if model == DEMO else model
    _check_source(source)
    tokenizer = _load_tokenizer(source)
    network = _load_network(source, DTYPES.get(dtype, "auto"), None if parted else device)
    if adapter is not None:
        network = merge_adapter(network, adapter)
    return wrap_model(network, tokenizer, name=_served_name(model))


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> LanguageModel:
    """A LanguageModel around a model that is loaded already; its blocks are found by a dry run."""
    blocks = find_blocks(model)
    identity = identify(model, num_layers=len(blocks), name=name)
    return LanguageModel(identity.id, model, tokenizer, blocks, identity)


def identify(model: PreTrainedModel, *, num_layers: int, name: str | None = None) -> ModelIdentity:
    """Which model this is. A model loaded from files is known by them, one in memory by its parameters."""
    return ModelIdentity(
        id=name or _served_name(str(model.config.name_or_path or type(model).__name__)),
        architecture=type(model).__name__,
        hidden_size=hidden_size_of(model),
        num_layers=num_layers,
        fingerprint=_fingerprint(model),
    )


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of the residual stream, whatever the configuration calls it and however wide the embedding is."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Decoder blocks, structurally: a list of modules that hand a residual stream `[batch, positions, hidden]` from one
    to the next (as a tensor, or first in a tuple), each running once per forward pass.

    Where several lists do so, the one as long as the configuration says is meant, else the longest; of equals (blocks,
    and the parts of a block) the one that finishes last. Raises ModelError if there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = [(f"{name}.{i}", member) for name, modules in lists.items() for i, member in enumerate(modules)]
    calls = trace_calls(members, lambda: _dry_run(model))
    shape = (1, DRY_RUN_TOKENS, hidden_size_of(model))
    candidates = [name for name, modules in lists.items() if _carries(name, len(modules), calls, shape)]
    if not candidates:
        raise ModelError(
            f"no decoder blocks were found in {type(model).__name__}: no list of modules hands a residual stream of "
            f"width {shape[-1]} from one to the next. This architecture cannot be steered yet."
        )
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    finished = [call.name for call in calls]

    def rank(name: str) -> tuple[bool, int, int]:
        length = len(lists[name])
        return length == expected, length, finished.index(f"{name}.{length - 1}")

    return tuple(lists[max(candidates, key=rank)])


def _carries(name: str, length: int, calls: list[Call], shape: tuple[int, ...]) -> bool:
    """Whether the members of a list ran once each, in order, every one given what the one before it returned."""
    names = [f"{name}.{i}" for i in range(length)]
    ours = [call for call in calls if call.name in set(names)]
    return (
        length > 0
        and [call.name for call in ours] == names
        and all(call.returned is not None and tuple(call.returned.shape) == shape for call in ours)
        and all(any(tensor is before.returned for tensor in call.given) for before, call in pairwise(ours))
    )


def _dry_run(model: PreTrainedModel) -> None:
    ids = torch.arange(1, DRY_RUN_TOKENS + 1, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # an architecture's own code: it may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot run on token ids alone, so its blocks cannot be found: {first_line(error)}"
        ) from error


def _check_source(source: str) -> None:
    """Tell what is wrong with a directory before transformers does it at length."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        _check_directory(directory)
    elif source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise ModelError(f"there is no model directory {source}")


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds no config.json: it is not a model's directory")
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        *others, last = TOKENIZER_FILES
        raise ModelError(
            f"{directory} holds no tokenizer ({', '.join(others)} or {last}): copy the model's tokenizer files into it"
        )
    if not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{directory} holds no safetensors weights, and no other format is read (a pickle can run code): "
            "convert them, for example by loading the model elsewhere and calling save_pretrained"
        )


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a stranger's files: anything can be wrong in them
        raise ModelError(f"the tokenizer of {source!r} cannot be loaded: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer of {source!r} is not a transformers tokenizer")
    return tokenizer


def _load_network(source: str, dtype: torch.dtype | str, device: str | None) -> PreTrainedModel:
    """On a device; None: this process's part, on the device that is this process's."""
    options = {} if device is not None else {"distributed_config": DistributedConfig(tp_plan="auto")}
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
        network = (network if device is None else network.to(device)).eval().requires_grad_(False)
    except Exception as error:  # a stranger's files: anything can be wrong in them
        raise ModelError(f"model {source!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source!r} lacks weights for {len(missing)} of its parameters, {missing[0]!r} among them: "
            "the checkpoint is incomplete, or it is not one of a causal language model"
        )
    return cast(PreTrainedModel, network)


def _served_name(model: str) -> str:
    """The hub id, `demo`, or a directory's last component."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _fingerprint(model: PreTrainedModel) -> str:
    directory = _checkpoint_directory(model)
    if directory is not None and any(directory.glob("*.safetensors")):
        return fingerprint_checkpoint(directory, model.config)
    return fingerprint_parameters(model)


def _checkpoint_directory(model: PreTrainedModel) -> Path | None:
    """Where a model's files lie: a directory itself, or the snapshot of a hub id that was downloaded already."""
    source = str(model.config.name_or_path or "")
    if not source or Path(source).is_dir():
        return Path(source) if source else None
    found = cached_file(
        source,
        "config.json",
        revision=getattr(model.config, "_commit_hash", None),
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
    )
    return Path(found).parent if found else None
