"""The settings of a server: each is a flag of `trimtab serve` and a `TRIMTAB_…` variable of the environment.

Owns their names, defaults, meanings and limits, and refuses values that cannot work before anything is loaded. Knows
nothing of models, engines or HTTP, so that importing it stays cheap.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
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
    slots: int = Field(16, ge=1, le=4096, description="How many generations run at once; the rest wait in a queue.")
    context: int | None = Field(
        None, ge=2, description="The most tokens of prompt and completion together; else the model's, up to 4096."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The number format of the weights; auto is the checkpoint's."
    )
    adapter: Path | None = Field(None, description="A LoRA in peft's format, merged into the model at start.")
    device: str = Field("cpu", pattern=r"^[a-z]+(:\d+)?$", description="Where the model runs, as torch names it.")
    served_model_name: str | None = Field(
        None, pattern=SINGLE_WORD, description="The name of the model in /v1; else its hub id or directory."
    )
    max_queue: int = Field(1024, ge=0, description="How many generations may wait; beyond it requests get a 429.")
    prefill_chunk: int = Field(
        256, ge=1, description="The most prompt tokens of one step, for all together; twice as many if none decodes."
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
    threads: int | None = Field(None, ge=1, le=1024, description="How many threads torch computes with; else its own.")
    allow_model_mismatch: bool = Field(
        False, description="Serve profiles that were fitted on other weights of the same shape."
    )
    api_key_file: Path | None = Field(
        None, description="A file of keys, one a line; if set, requests need one as a bearer token."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")


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
    name = str(detail["loc"][0])
    flag = f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"
    message = str(detail["msg"])
    return f"{flag}: {message[0].lower()}{message[1:]}, not {detail['input']!r}"
