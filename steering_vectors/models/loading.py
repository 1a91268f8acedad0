"""Loading a causal language model of any architecture: the model, its tokenizer, its blocks and its identity."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import cached_file

from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.blocks import find_blocks, hidden_size_of
from steering_vectors.models.fingerprint import fingerprint_checkpoint, fingerprint_parameters
from steering_vectors.models.gguf import SMOLLM2, SUFFIX, convert_gguf, converted_fingerprint, find_gguf, smollm2_file
from steering_vectors.models.tokenizers import choose_template, set_vocabulary
from steering_vectors.profiles.profile import ModelIdentity

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
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
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    adapter: Path | None = None,
    tensor_parallel: bool = False,
    chat_template: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load `demo`, `smollm2`, a directory, a hub id or a GGUF file; only safetensors and GGUF weights, no remote code.

    `dtype` is auto (the checkpoint's, see `computing_dtype`), float32, bfloat16 or float16. An `adapter` is a folder in
    peft's format, merged into the weights: the result is another model, whose profiles are its own. With
    `tensor_parallel` each process of torch's process group holds a part of the weights, and all run the same passes.
    `chat_template` is the name of one of the tokenizer's templates, or a Jinja file, to use in place of its default.
    `revision` is a commit, tag or branch of a hub id; all files are of the same commit, also without it.
    Raises ModelError with the remedy.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if revision is not None and not _is_hub_id(model):
        raise ModelError(f"revision {revision!r} is for hub ids, and {model} is not one: leave it out")
    source = _source(model)
    _check_source(source)
    commit = _commit(source, revision) if _is_hub_id(model) else None
    tokenizer = _load_tokenizer(source, commit)
    if chat_template is not None:
        choose_template(tokenizer, chat_template)
    network = _load_network(source, commit, DTYPES.get(dtype, "auto"), None if tensor_parallel else device)
    if dtype == "auto" and not tensor_parallel:
        network = cast(PreTrainedModel, network.to(computing_dtype(network.dtype, network.device)))
    if adapter is not None:
        network = _merged(network, adapter)
    return wrap_model(network, tokenizer, name=_served_name(model))


def computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the stored one, but float32 for bfloat16 on a CPU where oneDNN has no bfloat16 products.
    There torch's own make a fit about five times as slow as in float32. The conversion is exact."""
    if stored != torch.bfloat16 or device.type != "cpu":
        return stored
    return stored if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str | None = None) -> LanguageModel:
    """A LanguageModel around a model that is loaded already; its blocks are found by a dry run."""
    blocks = find_blocks(model)
    set_vocabulary(tokenizer, int(model.config.get_text_config().vocab_size))
    identity = identify(model, num_layers=len(blocks), name=name)
    return LanguageModel(identity.id, model, tokenizer, blocks, identity)


def identify(model: PreTrainedModel, *, num_layers: int, name: str | None = None) -> ModelIdentity:
    """Which model this is, by its files, or by its parameters if it exists in memory only."""
    return ModelIdentity(
        id=name or _served_name(str(model.config.name_or_path or type(model).__name__)),
        architecture=type(model).__name__,
        hidden_size=hidden_size_of(model),
        num_layers=num_layers,
        fingerprint=_fingerprint(model),
    )


def _source(model: str) -> str:
    """A directory or hub id that transformers loads; converts a GGUF file that was not converted before."""
    if model == DEMO:
        return str(DEMO_DIRECTORY)
    file = smollm2_file() if model == SMOLLM2 else find_gguf(model)
    if file is None:
        return model
    refuse_adapter(file.parent)
    return str(convert_gguf(file))


def _check_source(source: str) -> None:
    """Raise ModelError for what is wrong with a directory, in fewer words than transformers."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
            raise ModelError(f"there is no model directory {source}")
        return
    refuse_adapter(directory)
    if not (directory / "config.json").exists():
        raise ModelError(f"{directory} holds no config.json: it is not a model's directory")
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        *others, last = TOKENIZER_FILES
        raise ModelError(
            f"{directory} holds no tokenizer ({', '.join(others)} or {last}): copy the model's tokenizer files into it"
        )
    if not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"{directory} holds no safetensors weights, and of other formats only GGUF is read (a pickle can run "
            "code): convert them, for example by loading the model elsewhere and calling save_pretrained"
        )


def refuse_adapter(folder: Path, name: str = "") -> None:
    """Raise ModelError for a folder with an adapter: transformers would load the base model that the adapter names, or
    put the adapter into the model."""
    if (folder / ADAPTER_FILES[0]).is_file():
        raise ModelError(
            f"{name or folder} holds an adapter ({ADAPTER_FILES[0]}), so it is no base model: give the model that the "
            "adapter was made for, and the adapter's folder as --adapter"
        )


def _is_hub_id(model: str) -> bool:
    is_file = model in (DEMO, SMOLLM2) or model.lower().endswith(SUFFIX)
    return not is_file and not Path(model).expanduser().is_dir()


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub id, so that the tokenizer, the weights and the identity are those of one.

    Raises ModelError if it cannot be found, or if it holds an adapter.
    """
    try:
        for name in (ADAPTER_FILES[0], "config.json"):
            found = cached_file(
                source, name, revision=revision, _raise_exceptions_for_missing_entries=name == "config.json"
            )
            if found is not None and name == ADAPTER_FILES[0]:
                refuse_adapter(Path(found).parent, source)
    except OSError as error:
        wanted = source if revision is None else f"{source}@{revision}"
        raise ModelError(f"model {wanted!r} cannot be loaded: {first_line(error)}") from error
    return None if found is None else Path(found).parent.name


def _load_tokenizer(source: str, commit: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=False)
    except Exception as error:  # anything can be wrong in these files
        raise ModelError(f"the tokenizer of {source!r} cannot be loaded: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer of {source!r} is not a transformers tokenizer")
    return tokenizer


def load_checkpoint(kind: Any, source: str, *, commit: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A model of one of transformers' Auto classes, and the report of its loading; no code but transformers' own.

    The implementations of attention and experts are the architecture's default here: a checkpoint's config could name
    code of the hub in their place.
    """
    config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
    network, report = kind.from_pretrained(
        source,
        config=config,
        revision=commit,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=None,
        experts_implementation=None,
        output_loading_info=True,
        **options,
    )
    network.config._commit_hash = commit
    return network, report


def _load_network(source: str, commit: str | None, dtype: torch.dtype | str, device: str | None) -> PreTrainedModel:
    """The model on a device. Without one, this process's part of it, on this process's device."""
    options = {} if device is not None else {"distributed_config": DistributedConfig(tp_plan="auto")}
    try:
        network, report = load_checkpoint(AutoModelForCausalLM, source, commit=commit, dtype=dtype, **options)
        network = (network if device is None else network.to(device)).eval().requires_grad_(False)
    except Exception as error:  # anything can be wrong in these files
        raise ModelError(f"model {source!r} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {source!r} lacks weights for {len(missing)} of its parameters, {missing[0]!r} among them: "
            "the checkpoint is incomplete, or it is not one of a causal language model"
        )
    return cast(PreTrainedModel, network)


def _merged(network: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The network with the updates of a LoRA in peft's format added to its weights. It is another model then, so its
    path is cleared."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} holds no {name}: it is not an adapter in peft's format (safetensors)")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("an adapter needs peft: pip install 'trimtab[rahf]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute of transformers by its old name
            warnings.filterwarnings("error", message="Found missing adapter keys")
            merged = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    except Exception as error:  # anything can be wrong in these files
        raise ModelError(f"adapter {folder} cannot be put into this model: {first_line(error)}") from error
    merged.config.name_or_path = ""
    return cast(PreTrainedModel, merged.eval().requires_grad_(False))


def _served_name(model: str) -> str:
    """The hub id, `demo`, `smollm2`, a directory's last component or the name of a GGUF file."""
    if model.lower().endswith(SUFFIX):
        return Path(model).stem
    return Path(model).resolve().name if Path(model).is_dir() else model


def _fingerprint(model: PreTrainedModel) -> str:
    directory = _checkpoint_directory(model)
    if directory is not None and (found := converted_fingerprint(directory)):
        return found
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
