"""The settings of a server: each is a flag of `trimtab serve` and a `TRIMTAB_…` variable of the environment.

Owns their names, defaults, meanings and limits, and refuses values that cannot work before anything is loaded. Knows
nothing of models, engines or HTTP, so that importing it stays cheap.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from steering_vectors.errors import TrimtabError

PREFIX = "TRIMTAB_"
OF_CHAT = frozenset({"TRIMTAB_URL", "TRIMTAB_API_KEY"})  # what `trimtab chat` reads from the same environment
SINGLE_WORD = r"^\S+$"


class ConfigurationError(TrimtabError):
    """A setting, or what it points to, is not usable."""

    code = "invalid_configuration"


class Settings(BaseSettings):
    """Everything that `trimtab serve` can be told. A flag wins over the environment, the environment over a default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    model: str = Field("demo", min_length=1, description="The model: demo, a directory or a hub id.")
    profiles: Path = Field(Path("profiles"), description="The directory of profiles; it is watched for changes.")
    host: str = Field("127.0.0.1", pattern=SINGLE_WORD, description="The address to listen on; 0.0.0.0 is all.")
    port: int = Field(8000, ge=0, le=65535, description="The port to listen on; 0 takes any free one.")
    slots: int = Field(
        16,
        ge=1,
        le=4096,
        description="How many generations run at once; the rest wait in a queue. On CUDA, if it is not given, as many "
        "as memory holds, up to 128.",
    )
    context: int | None = Field(
        None, ge=2, description="The most tokens of prompt and completion together; else the model's, up to 4096."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The number format of the weights; auto is the checkpoint's."
    )
    adapter: Path | None = Field(None, description="A LoRA in peft's format, merged into the model at start.")
    device: str = Field("cpu", pattern=r"^[a-z]+(:\d+)?$", description="Where the model runs, as torch names it.")
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The share of a GPU's memory that may be in use, else 0.9; slots must fit into it.",
    )
    cuda_graphs: bool | None = Field(
        None, description="On CUDA, replay decoding steps as graphs; else where the model allows it."
    )
    tensor_parallel: bool = Field(
        False, description="Under torchrun, split the model among its processes; the first one serves."
    )
    served_model_name: str | None = Field(
        None, pattern=SINGLE_WORD, description="The name of the model in /v1; else its hub id or directory."
    )
    max_queue: int = Field(1024, ge=0, description="How many generations may wait; beyond it requests get a 429.")
    prefill_chunk: int = Field(
        256,
        ge=1,
        description="The most prompt tokens of one step, for all together; four times as many if none decodes.",
    )
    max_stall_ms: float | None = Field(
        None, gt=0, description="How long rows that decode may wait for prompts; else 1.5 times as long as for a token."
    )
    prefix_reuse: bool = Field(
        True, description="Keep what was computed of a prompt for others that begin alike and are steered alike."
    )
    cpu_prepack: bool = Field(
        False,
        description="On a CPU, reorder and join the weights of linear layers at start and fuse the blocks between them "
        "where their kind is known: several times as fast in bfloat16.",
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None,
        description="On a CPU with AVX512-BF16, hold the weights of linear layers in 8 or 4 bits, packed as by "
        "--cpu-prepack, which it includes: small batches are faster and memory is saved, at some cost in quality.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="How many threads compute; else one for each processor core it may use."
    )
    allow_model_mismatch: bool = Field(
        False, description="Serve profiles that were fitted on other weights of the same shape."
    )
    api_key_file: Path | None = Field(
        None, description="A file of keys, one a line; if set, requests need one as a bearer token."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        """What is for GPUs alone is not ignored elsewhere."""
        if not self.device.startswith("cuda"):
            given = {"--gpu-memory-utilization": self.gpu_memory_utilization, "--cuda-graphs": self.cuda_graphs or None}
            for flag, value in given.items():
                if value is not None:
                    raise ValueError(f"{flag} is for GPUs: leave it out, or serve with --device cuda")
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        """What a model in parts cannot be combined with is refused."""
        if self.tensor_parallel:
            given = {
                "--adapter": self.adapter,
                "--cpu-prepack": self.cpu_prepack,
                "--quantize": self.quantize,
                "--cuda-graphs": self.cuda_graphs,
            }
            for flag, value in given.items():
                if value:
                    raise ValueError(f"{flag} does not go with --tensor-parallel: leave one of them out")
            if ":" in self.device:
                raise ValueError("--device names one device; with --tensor-parallel give cpu or cuda alone")
            if "RANK" not in os.environ:
                raise ValueError("--tensor-parallel needs torchrun: torchrun --nproc-per-node 2 -m server.cli serve …")
        return self


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """Settings from what was given, the environment and the defaults. Raises ConfigurationError that names the flag."""
    try:
        return Settings(**dict(given or {}))
    except ValidationError as error:
        raise ConfigurationError("; ".join(_describe(detail) for detail in error.errors())) from error


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables of the environment that look like settings and are none, for a warning."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | OF_CHAT
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)


def read_api_keys(path: Path) -> frozenset[str]:
    """The keys of a file, one a line; blank lines and lines that begin with # do not count.

    Raises ConfigurationError if there is none: a server that was told to ask for keys never runs without.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"the API key file {path} cannot be read ({reason})") from error
    keys = frozenset(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigurationError(f"the API key file {path} holds no key: write one a line, or leave --api-key-file out")
    return keys


def _describe(detail: Any) -> str:
    if not detail["loc"]:  # of several settings together
        return str(detail["ctx"]["error"])
    name = str(detail["loc"][0])
    flag = f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"
    message = str(detail["msg"])
    return f"{flag}: {message[0].lower()}{message[1:]}, not {detail['input']!r}"
