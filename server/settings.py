"""The settings of a server: each is a flag of `trimtab serve` and a `TRIMTAB_…` environment variable.

Values that cannot work are refused before anything is loaded.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.engines.config import DEFAULT_CHUNK, DEFAULT_QUEUE, DEFAULT_SLOTS, DEFAULT_STEP_TIMEOUT, EngineConfig
from steering_vectors.errors import TrimtabError

PREFIX = "TRIMTAB_"
OF_OTHERS = frozenset({"TRIMTAB_URL", "TRIMTAB_CACHE"})  # read from the same environment, by `trimtab chat` and by all
OF_ACCESS = (
    "api_key",
    "api_key_file",
    "allow_unauthenticated",
    "allowed_hosts",
    "cors_origins",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_keyfile_password",
    "ssl_ca_certs",
)
SINGLE_WORD = r"^\S+$"
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw]?)")
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class ConfigurationError(TrimtabError):
    """A setting, or what it points to, is not usable."""

    code = "invalid_configuration"


def _setting(panel: str, default: Any, description: str, **limits: Any) -> Any:
    """`panel` is the group of flags in `trimtab serve --help`."""
    return Field(default, description=description, json_schema_extra={"panel": panel}, **limits)


_model, _serving, _steering, _limits, _performance, _gpu, _security, _logging, _feedback, _jobs = (
    partial(_setting, panel)
    for panel in "Model Serving Steering Limits Performance GPU Security Logging Feedback Jobs".split()
)


class Settings(BaseSettings):
    """The settings of `trimtab serve`. A flag wins over the environment, the environment over a default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True)

    model: str = _model("demo", "The model: demo, smollm2, a directory, a GGUF file or a hub id.", min_length=1)
    revision: str | None = _model(
        None, "The commit, tag or branch of a hub id; a commit never changes. By default the main branch.", min_length=1
    )
    chat_template: str | None = _model(
        None,
        "The chat template: the name of one of the tokenizer's, or a Jinja file; by default its own.",
        min_length=1,
    )
    adapter: Path | None = _model(None, "A LoRA in peft's format, merged into the model at start.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _model(
        "auto", "The data type of the weights; auto is the checkpoint's, or float32 on a CPU without bfloat16 products."
    )
    context: int | None = _model(
        None, "Maximum number of tokens of prompt and completion together; by default the model's, up to 4096.", ge=2
    )
    host: str = _serving("127.0.0.1", "The address to listen on; 0.0.0.0 is every interface.", pattern=SINGLE_WORD)
    port: int = _serving(8000, "The port to listen on; 0 takes any free one.", ge=0, le=65535)
    uds: Path | None = _serving(
        None, "A unix socket to listen on, in place of --host and --port. It is removed when the server ends."
    )
    uds_mode: str = _serving(
        "600",
        "The permissions of --uds, in octal: 600 lets only its owner connect, 660 its group as well.",
        pattern=r"^[0-7]{3}$",
    )
    served_model_name: str | None = _serving(
        None, "The model's name in /v1; by default its hub id or directory.", pattern=SINGLE_WORD
    )
    slots: int = _serving(
        DEFAULT_SLOTS,
        "Maximum number of generations that run at once; others wait in a queue. On CUDA the default is what fits into "
        "memory, up to 128.",
        ge=1,
        le=4096,
    )
    max_queue: int = _serving(
        DEFAULT_QUEUE, "Maximum number of generations that wait; requests beyond it get a 429.", ge=0
    )
    max_queue_share: float = _serving(
        0.5,
        "The share of the queue that one request, and all requests of one API key, may take; beyond it, a request gets "
        "a 400, a key a 429. Bytes in flight are shared alike.",
        gt=0,
        le=1,
    )
    drain_seconds: float = _serving(
        6.0,
        "Maximum time that running requests may take after SIGTERM, before they end in an error. Set it below the time "
        "after which your supervisor kills the process.",
        ge=0,
    )
    step_timeout_seconds: float = _serving(
        DEFAULT_STEP_TIMEOUT,
        "Maximum time of one forward pass; beyond it the engine counts as hung, and the server ends with exit code 70.",
        gt=0,
    )
    profiles: Path = _steering(Path("profiles"), "The directory of profiles, which is watched for changes.")
    profile_versions: int = _steering(
        5,
        "Number of replaced versions of each profile that are kept, besides those that an alias or a running "
        "generation uses.",
        ge=0,
        le=1000,
    )
    profile_quota_bytes: int = _steering(
        2**30, "Maximum size of all profiles and kept versions together; an upload beyond it is a 413.", ge=2**20
    )
    audit_log: Path | None = _steering(
        None,
        "The file to which changes of profiles are appended, as JSON lines; by default .trimtab/audit.jsonl in the "
        "directory of profiles.",
    )
    allow_model_mismatch: bool = _steering(False, "Serve profiles that were fitted on other weights of the same shape.")
    max_body_bytes: int = _limits(4 * 2**20, "Maximum size of a request's body; a larger one is a 413.", ge=1024)
    max_bytes_in_flight: int = _limits(
        256 * 2**20, "Maximum size of the bodies of all requests that are being answered; beyond it, a 429.", ge=1024
    )
    max_answer_values: int = _limits(
        500_000,
        "Maximum number of values that an answer reports besides its text: log-probabilities, alternatives, "
        "divergences, projections and changes of a schedule, over all choices and tokens; beyond it, a 400. All "
        "requests together may have four times as many; beyond it, a 429.",
        ge=1000,
    )
    max_tokens_limit: int | None = _limits(
        None,
        "Maximum number of tokens that a request may ask for, for each of its texts; beyond it, a 400. It is also what "
        "a request gets that leaves max_tokens out, unless the default is less.",
        ge=1,
    )
    max_n: int = _limits(128, "Maximum number of choices of a prompt; beyond it, a 400.", ge=1, le=128)
    default_timeout_seconds: float = _limits(
        600.0, "Maximum time in which a request without timeout is answered; beyond it, a 504.", gt=0
    )
    max_timeout_seconds: float = _limits(3600.0, "Maximum timeout that a request may ask for; beyond it, a 400.", gt=0)
    max_header_bytes: int = _limits(65536, "Maximum size of a request's line and headers; beyond it, a 431.", ge=1024)
    max_header_fields: int = _limits(100, "Maximum number of a request's headers; beyond it, a 431.", ge=16)
    header_timeout_seconds: float = _limits(10.0, "Maximum time in which headers must arrive; then a 408.", gt=0)
    body_timeout_seconds: float = _limits(60.0, "Maximum time in which a body must arrive; then a 408.", gt=0)
    min_body_rate: int = _limits(
        1024, "Minimum bytes per second of a body that takes longer than 10 s; a slower one is a 408.", ge=0
    )
    write_timeout_seconds: float = _limits(
        60.0, "Maximum time for which a client may take nothing of its answer; then it is cut off.", gt=0
    )
    max_connections: int | None = _limits(
        None,
        "Maximum number of open connections; beyond it, a 503. By default what the limit of open files allows.",
        ge=1,
    )
    prefill_chunk: int = _performance(
        DEFAULT_CHUNK,
        "Maximum number of prompt tokens per step, over all requests; four times as many while nothing decodes.",
        ge=1,
    )
    max_stall_ms: float | None = _performance(
        None,
        "Maximum time that decoding waits for prompts, in milliseconds; by default 1.5 times that of a decoding step.",
        gt=0,
    )
    prefix_reuse: bool = _performance(
        True, "Keep the KV cache of prompts for requests with the same prefix and the same steering."
    )
    cpu_prepack: bool | None = _performance(
        None,
        "On a CPU, reorder and join the weights of linear layers at start, and fuse the blocks of known architectures; "
        "by default where that is expected to be faster and agrees with the plain model.",
    )
    quantize: Literal["int8", "int4", "gguf"] | None = _performance(
        None,
        "On a CPU with AVX512-BF16, hold the weights of linear layers in 8 or 4 bits; includes --cpu-prepack. Small "
        "batches are faster and memory is saved, at some cost in quality. gguf keeps the codes of a GGUF file "
        "(Q8_0, Q4_0, Q4_1), on any CPU with AVX2 and without a loss.",
    )
    threads: int | None = _performance(
        None, "Number of compute threads; by default one per available processor core.", ge=1, le=1024
    )
    engine_process: bool = _performance(False, "Run the engine in a process of its own, which is restarted if it dies.")
    device: str = _gpu(
        "cpu", "The device of the model, as torch names it: cpu, cuda, cuda:1.", pattern=r"^[a-z]+(:\d+)?$"
    )
    gpu_memory_utilization: float | None = _gpu(
        None, "The share of the GPU's memory to use, by default 0.9; the slots must fit into it.", gt=0, le=1
    )
    cuda_graphs: bool | None = _gpu(None, "Replay decoding steps as CUDA graphs; by default where the model allows it.")
    tensor_parallel: bool = _gpu(False, "Under torchrun, split the model among its processes; the first one serves.")
    api_key: str | None = _security(
        None,
        "A key that requests need as a bearer token, beside those of --api-key-file; better in the environment.",
        repr=False,
    )
    api_key_file: Path | None = _security(
        None,
        "A file of API keys, as `trimtab keys` writes it, or one key per line; if set, requests need one as a bearer "
        "token. It is read again when it changes.",
    )
    allow_unauthenticated: bool = _security(
        False, "Serve without keys on an address that other machines can reach; refused otherwise."
    )
    ssl_certfile: Path | None = _security(
        None, "A certificate in PEM, followed by those that lead to its root: serve HTTPS in place of HTTP."
    )
    ssl_keyfile: Path | None = _security(None, "The key of --ssl-certfile in PEM, if it is in a file of its own.")
    ssl_keyfile_password: str | None = _security(
        None, "The password of an encrypted key; better in the environment.", repr=False
    )
    ssl_ca_certs: Path | None = _security(
        None, "Certificates in PEM: only clients with a certificate that one of them signed may connect."
    )
    allowed_hosts: str | None = _security(
        None,
        "The names that clients may use for this server in the Host header, with commas between them; *.example.com is "
        "every name below it, * is any. Loopback names are always allowed; by default others are, unless --host is a "
        "loopback address.",
        min_length=1,
    )
    cors_origins: str | None = _security(
        None,
        "The web origins whose pages may use the server from a browser, such as https://example.com, with commas "
        "between them; * is any.",
        min_length=1,
    )
    requests_per_minute: int | None = _security(
        None, "Maximum number of requests per minute of each key; keys may have their own.", ge=1
    )
    tokens_per_minute: int | None = _security(
        None, "Maximum number of generated tokens per minute of each key; keys may have their own.", ge=1
    )
    concurrent_requests: int | None = _security(
        None, "Maximum number of requests of each key at once; keys may have their own.", ge=1
    )
    limits_storage: str = _security(
        "memory://",
        "Where requests and tokens per minute are counted: in this process, or at a redis:// URL for several servers.",
        pattern=r"^(memory://|rediss?://.+)$",
        repr=False,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _logging("info", "The minimum level of log messages.")
    log_format: Literal["text", "json"] = _logging("text", "The form of log messages: text, or a JSON object per line.")
    log_prompts: bool = _logging(False, "Write prompts into the access log, which has no text of requests otherwise.")
    otlp_traces_endpoint: str | None = _logging(
        None,
        "The URL to send OpenTelemetry traces to, by OTLP over HTTP; needs the extra otel.",
        pattern=r"^https?://\S+$",
    )
    feedback_database: str | None = _feedback(
        None,
        "Where feedback is stored: a file, which SQLite creates, or a postgresql:// URL. By default nowhere, and "
        "/feedback is off.",
        min_length=1,
        repr=False,
    )
    keep_generations: str = _feedback(
        "0",
        "How long generations are kept in the feedback database, with prompts and texts, so that feedback can name "
        "them: 90s, 30m, 12h, 7d, 4w, or forever.",
    )
    keep_feedback: str = _feedback(
        "forever", "How long feedback is kept, with its copies of prompts and texts: a time as above, or forever."
    )

    jobs: bool = _jobs(
        False,
        "Run fits, calibrations and evaluations that are asked for over HTTP, in processes of their own. Needs "
        "--feedback-database, where jobs are stored.",
    )
    jobs_at_once: int = _jobs(
        1, "Maximum number of jobs that run at once on this machine, of all servers of this user.", ge=1, le=64
    )
    jobs_device: str = _jobs(
        "cpu", "The device of jobs: cpu, cuda or cuda:N. Each job loads the model again, beside the one that is served."
    )
    jobs_data: Path | None = _jobs(
        None, "The directory whose files jobs may read as preference data; by default they may read none."
    )
    keep_jobs: str = _jobs("30d", "How long jobs that have ended are kept, with their logs: 12h, 30d, or forever.")

    @model_validator(mode="after")
    def _check_jobs(self) -> Self:
        try:
            seconds_of(self.keep_jobs)
        except ValueError as error:
            raise ValueError(f"--keep-jobs {error}") from error
        if self.jobs and self.feedback_database is None:
            raise ValueError("--jobs needs a database to store jobs in: give --feedback-database")
        if self.jobs and self.tensor_parallel:
            raise ValueError("--jobs loads the model in one process: leave it out, or serve without --tensor-parallel")
        if not self.jobs:
            for name in ("jobs_at_once", "jobs_device", "jobs_data", "keep_jobs"):
                if name in self.model_fields_set:
                    raise ValueError(f"--{name.replace('_', '-')} is for jobs: leave it out, or give --jobs")
        return self

    @model_validator(mode="after")
    def _check_feedback(self) -> Self:
        for flag, text in (("--keep-generations", self.keep_generations), ("--keep-feedback", self.keep_feedback)):
            try:
                seconds = seconds_of(text)
            except ValueError as error:
                raise ValueError(f"{flag} {error}") from error
            if flag == "--keep-feedback" and seconds == 0:
                raise ValueError("--keep-feedback 0 would keep nothing: leave --feedback-database out")
        if self.feedback_database is None and seconds_of(self.keep_generations) != 0:
            raise ValueError("--keep-generations needs a database to keep them in: give --feedback-database")
        return self

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        """Refuse GPU settings on other devices, where they would have no effect."""
        if not self.device.startswith("cuda"):
            given = {"--gpu-memory-utilization": self.gpu_memory_utilization, "--cuda-graphs": self.cuda_graphs or None}
            for flag, value in given.items():
                if value is not None:
                    raise ValueError(f"{flag} is for GPUs: leave it out, or serve with --device cuda")
        return self

    @model_validator(mode="after")
    def _check_parallel(self) -> Self:
        """Refuse settings that cannot be combined with a split model."""
        if self.tensor_parallel:
            given = {
                "--adapter": self.adapter,
                "--cpu-prepack": self.cpu_prepack,
                "--quantize": self.quantize,
                "--cuda-graphs": self.cuda_graphs,
                "--engine-process": self.engine_process,
            }
            for flag, value in given.items():
                if value:
                    raise ValueError(f"{flag} does not go with --tensor-parallel: leave one of them out")
            if ":" in self.device:
                raise ValueError("--device names one device; with --tensor-parallel give cpu or cuda alone")
            if "RANK" not in os.environ:
                raise ValueError("--tensor-parallel needs torchrun: torchrun --nproc-per-node 2 -m server.cli serve …")
        return self

    @model_validator(mode="after")
    def _check_timeouts(self) -> Self:
        most, default = self.max_timeout_seconds, self.default_timeout_seconds
        if default > most:
            raise ValueError(
                f"--default-timeout-seconds is {default:g}, more than --max-timeout-seconds, which is {most:g}: raise "
                "that, or lower this"
            )
        return self

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        """Refuse settings that would leave a server open by mistake."""
        for name in ("api_key", "api_key_file"):
            flag, variable = f"--{name.replace('_', '-')}", f"{PREFIX}{name.upper()}"
            given = getattr(self, name)
            if given is None and any(one.upper() == variable and not value for one, value in os.environ.items()):
                raise ValueError(f"{variable} is empty: give it a value, or unset it to serve without")
            if given is not None and not str(given).strip():
                raise ValueError(f"{flag} ({variable}) is empty: give it a value, or leave it out to serve without")
        if not self.requires_keys:
            for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name.replace('_', '-')} is counted for each key: give --api-key-file, or leave it out"
                    )
            if not self.allow_unauthenticated and not self.is_local:
                who = f"--host {self.host} lets other machines"
                if self.uds is not None:
                    who = f"--uds-mode {self.uds_mode} lets every user of this machine"
                raise ValueError(
                    f"{who} reach a server without keys: give --api-key-file or "
                    f"{PREFIX}API_KEY, or --allow-unauthenticated if everyone may use it"
                )
        return self

    @model_validator(mode="after")
    def _check_sockets(self) -> Self:
        """Refuse settings of a socket that would have no effect."""
        if self.uds is not None and (both := {"host", "port"} & self.model_fields_set):
            raise ValueError(f"--uds is listened on in place of --{min(both)}: leave one of them out")
        if self.uds is None and "uds_mode" in self.model_fields_set:
            raise ValueError("--uds-mode is for --uds: leave it out, or give --uds")
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} needs --ssl-certfile: give it, or leave both out")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the server can be reached from this machine only, and not by all of its users by a unix socket."""
        if self.uds is not None:
            return not int(self.uds_mode, 8) & stat.S_IWOTH
        return is_loopback(self.host)

    @property
    def requires_keys(self) -> bool:
        return self.api_key is not None or self.api_key_file is not None

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        return _listed(self.allowed_hosts)

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        return _listed(self.cors_origins)

    def engine_config(self) -> EngineConfig:
        """The settings of the engine. Slots that were not set are the engine's to choose."""
        given = {one.name: getattr(self, one.name) for one in fields(EngineConfig)}
        return EngineConfig(**{**given, "slots": self.slots if "slots" in self.model_fields_set else None})


def seconds_of(duration: str) -> float | None:
    """The seconds of `90s`, `30m`, `12h`, `7d` or `4w`; None for `forever`. Raises ValueError."""
    if duration == "forever":
        return None
    found = DURATION.fullmatch(duration)
    if found is None:
        raise ValueError(f"is a time such as 30m, 12h or 7d, or forever; not {duration[:40]!r}")
    return float(found[1]) * SECONDS[found[2]]


def load_settings(given: Mapping[str, Any] | None = None) -> Settings:
    """Settings from what was given, the environment and the defaults. Raises ConfigurationError that names the flag."""
    try:
        return Settings(**dict(given or {}))
    except ValidationError as error:
        raise ConfigurationError("; ".join(_describe(detail) for detail in error.errors())) from error


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Environment variables that have the prefix and are not settings, for a warning."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | OF_OTHERS
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)


def refuse_mistyped_access(unknown: Sequence[str]) -> None:
    """Raise ConfigurationError for an unknown variable that was meant to protect the server, as far as can be seen."""
    known = [f"{PREFIX}{name}".upper() for name in OF_ACCESS]
    for name in unknown:
        close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.85)
        if close or "KEY" in name.upper().removeprefix(PREFIX):
            meant = close[0] if close else f"{PREFIX}API_KEY or {PREFIX}API_KEY_FILE"
            raise ConfigurationError(f"the environment variable {name} is not a setting: is {meant} meant?")


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address or name can be reached from this machine only."""
    try:
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:  # it cannot be listened on either
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _describe(detail: Any) -> str:
    """What is wrong with one setting. Settings that may hold a secret are not shown."""
    if not detail["loc"]:  # of several settings together
        return str(detail["ctx"]["error"])
    name = str(detail["loc"][0])
    flag = f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"
    message = str(detail["msg"])
    given = f", not {detail['input']!r}" if Settings.model_fields[name].repr else ""
    return f"{flag}: {message[0].lower()}{message[1:]}{given}"
