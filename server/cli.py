"""The command `trimtab`: `serve` and `chat` are here, everything else comes from `steering_vectors.cli.app`.

Owns flags, the one line that says where the server is, and exit codes. Importing it loads no model code,
so that `trimtab --help` answers at once.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.http.listener import Server, listen, run_in_loop, url_of
from server.settings import PREFIX, Settings, load_settings
from steering_vectors.cli.app import FAILED, INTERRUPTED, register
from steering_vectors.errors import TrimtabError

if TYPE_CHECKING:
    from server.state import Service

app = typer.Typer(
    name="trimtab",
    help="Steer a language model while it writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {importlib.metadata.version('trimtab')}")
        raise typer.Exit


def flag(name: str, *declarations: str) -> Any:
    """The option for a setting: its text and default are the setting's own."""
    setting = Settings.model_fields[name]
    default = "" if setting.default is None else f"default: {str(setting.default).lower()}; "
    text = f"{setting.description} ({default}environment: {PREFIX}{name.upper()})"
    return typer.Option(*declarations, help=text, show_default=False)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Steer a language model while it writes: fit profiles from preferences, serve them at any strength."""


@app.command()
def serve(
    invocation: typer.Context,
    model: Annotated[str | None, flag("model")] = None,
    adapter: Annotated[Path | None, flag("adapter")] = None,
    profiles: Annotated[Path | None, flag("profiles")] = None,
    host: Annotated[str | None, flag("host")] = None,
    port: Annotated[int | None, flag("port")] = None,
    slots: Annotated[int | None, flag("slots")] = None,
    context: Annotated[int | None, flag("context")] = None,
    dtype: Annotated[str | None, flag("dtype")] = None,
    device: Annotated[str | None, flag("device")] = None,
    gpu_memory_utilization: Annotated[float | None, flag("gpu_memory_utilization")] = None,
    cuda_graphs: Annotated[bool | None, flag("cuda_graphs", "--cuda-graphs/--no-cuda-graphs")] = None,
    tensor_parallel: Annotated[bool | None, flag("tensor_parallel", "--tensor-parallel/--no-tensor-parallel")] = None,
    served_model_name: Annotated[str | None, flag("served_model_name")] = None,
    max_queue: Annotated[int | None, flag("max_queue")] = None,
    prefill_chunk: Annotated[int | None, flag("prefill_chunk")] = None,
    max_stall_ms: Annotated[float | None, flag("max_stall_ms")] = None,
    prefix_reuse: Annotated[bool | None, flag("prefix_reuse", "--prefix-reuse/--no-prefix-reuse")] = None,
    cpu_prepack: Annotated[bool | None, flag("cpu_prepack", "--cpu-prepack/--no-cpu-prepack")] = None,
    quantize: Annotated[str | None, flag("quantize")] = None,
    threads: Annotated[int | None, flag("threads")] = None,
    allow_model_mismatch: Annotated[
        bool | None, flag("allow_model_mismatch", "--allow-model-mismatch/--no-allow-model-mismatch")
    ] = None,
    api_key_file: Annotated[Path | None, flag("api_key_file")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
) -> None:
    """Serve a model and a directory of profiles over HTTP."""
    given = {name: value for name, value in invocation.params.items() if value is not None}
    settings = load_settings(given)
    _log(settings.log_level)
    if settings.tensor_parallel and os.environ["RANK"] != "0":
        from server.state import follow

        follow(settings)
        return
    with suppress(KeyboardInterrupt), listen(settings.host, settings.port) as listener:
        run_in_loop(_serve(settings, listener))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the server is.", envvar="TRIMTAB_URL")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The served model, or an alias such as demo:warm@0.8.")] = "",
    system: Annotated[str, typer.Option(help="The system message to begin with.")] = "",
    api_key: Annotated[
        str, typer.Option(help="For servers that ask for one; better in the environment.", envvar="TRIMTAB_API_KEY")
    ] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes every reply repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of a reply.")] = None,
) -> None:
    """Talk to a running server in the terminal, and steer it while you do; reads lines from a pipe too."""
    from server.chat.conversation import Sampling
    from server.chat.terminal import chat as talk

    try:
        well = talk(url, api_key, model, system, Sampling(temperature, seed, max_tokens))
    except KeyboardInterrupt as stop:
        raise typer.Exit(INTERRUPTED) from stop
    if not well:
        raise typer.Exit(FAILED)


register(app)


def main() -> None:
    """The console command: errors raised on purpose are one line and exit code 2, a Ctrl-C is one and 130."""
    try:
        app()
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:  # before a command has begun; each answers for itself afterwards
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


async def _serve(settings: Settings, listener: socket.socket) -> None:
    """Serve until told to stop. Raises what went wrong if the model or the profiles cannot be loaded."""
    import torch
    from transformers.utils import logging as transformers_logging

    from server.app import create_app
    from steering_vectors.runtime.cpu.threads import processors

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # the processors are the engine's alone; see steering_vectors.runtime.cpu.threads
    settings = settings.model_copy(update={"threads": settings.threads or processors()})
    torch.set_num_threads(1)
    application = create_app(settings)
    service = application.state.service
    server = Server(application, end=service.close, access_log=settings.log_level == "debug")
    announcing = asyncio.create_task(_announce(service, url_of(settings.host, listener), server.stop))
    await server.serve(sockets=[listener])
    if announcing.done():
        announcing.result()
    announcing.cancel()


async def _announce(service: Service, url: str, stop: Callable[[], None]) -> None:
    try:
        await service.wait_ready()
    except Exception:
        stop()
        raise
    _settle()
    count = len(service.registry.served)
    profiles = "1 profile" if count == 1 else f"{count} profiles"
    print(f"trimtab serves {service.model_name} with {profiles} on {url}", flush=True)


def _settle() -> None:
    """What is loaded stays: leave its million objects out of garbage collections, which would hold up streams."""
    gc.collect()
    gc.freeze()


def _log(level: str) -> None:
    """Log to stderr; uvicorn's own remarks only where all is asked for."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
