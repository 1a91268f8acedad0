"""The command `trimtab`: `serve`, `chat`, those of a server and its database, and the offline commands of
`steering_vectors.cli`.

What a command needs is imported when it runs, so that `--help` answers at once and `fit` never loads the server.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import inspect
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args, get_origin

import typer
from typer.core import TyperCommand

from server.access.commands import keys
from server.chat.job_commands import jobs
from server.chat.profile_commands import profiles
from server.feedback.feedback_commands import feedback
from server.learning.amplify_commands import register_amplify
from server.learning.refine_commands import register_learning
from steering_vectors.cli.app import FAILED, INTERRUPTED, register, with_flags
from steering_vectors.cli.flags import declare
from steering_vectors.errors import TrimtabError
from steering_vectors.runtime.cpu.allocator import keep_freed_memory
from steering_vectors.runtime.cpu.spinning import spinning_unless_shared

if TYPE_CHECKING:
    import socket

    from pydantic.fields import FieldInfo

    from server.settings import Settings
    from server.state import Service

ENGINE_FAILED = 70  # an internal software error, in sysexits.h
WATCH_SECONDS = 0.25
UNHEALTHY_SECONDS = 1.0  # in which /health answers 503 before the process ends
THREAD_SECONDS = 1.0

SERVE_HELP = "Serve a model and a directory of profiles over HTTP."

app = typer.Typer(
    name="trimtab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {importlib.metadata.version('trimtab')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Steer a language model while it writes: fit profiles from preferences, serve them at any strength."""


class ServeCommand(TyperCommand):
    """`trimtab serve`, whose flags are made when they are first used."""

    @property
    def params(self) -> list[Any]:
        return list(serve_command().params)

    @params.setter
    def params(self, given: list[Any]) -> None:
        """The stub has none."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return serve_command().make_context(*args, **kwargs)


@app.command("serve", cls=ServeCommand, help=SERVE_HELP)
def _serve_stub() -> None: ...


@cache
def serve_command() -> Any:
    """The command with one flag for each setting, grouped by the settings' panels."""
    from server.settings import Settings

    def run(**given: Any) -> None:
        serve({name: value for name, value in given.items() if value is not None})

    declare(run, [_flag(name, field) for name, field in Settings.model_fields.items()])
    only = typer.Typer(add_completion=False)
    only.command("serve", help=SERVE_HELP)(run)
    return typer.main.get_command(only)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a setting. Values of a choice are strings here: the settings check them."""
    from server.settings import PREFIX

    kind, flag = value_kind(field.annotation), f"--{name.replace('_', '-')}"
    default = "" if field.default is None else f"default: {str(field.default).lower()}; "
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=f"{field.description} ({default}environment: {PREFIX}{name.upper()})",
        metavar="|".join(get_args(kind)) or None,
        rich_help_panel=cast(dict[str, str], field.json_schema_extra)["panel"],
        show_default=False,
    )
    optional: Any = (str if get_args(kind) else kind) | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[optional, option])


def value_kind(annotation: Any) -> Any:
    """The X of `X | None`."""
    if get_origin(annotation) is Literal:
        return annotation
    return next((one for one in get_args(annotation) if one is not NoneType), annotation)


def serve(given: Mapping[str, Any]) -> None:
    """Serve with these settings, the environment's and the defaults, until the process is told to stop."""
    from server.http.listener import listening, run_in_loop
    from server.observability.logs import set_up_logs
    from server.settings import load_settings

    settings = load_settings(given)
    set_up_logs(settings.log_format, settings.log_level)
    if settings.tensor_parallel and os.environ["RANK"] != "0":
        from server.engines.torch.build import follow

        follow(settings.engine_config())
        return
    before, code = set(threading.enumerate()), 0
    with suppress(KeyboardInterrupt), listening(settings) as listener:
        code = run_in_loop(_serve(settings, listener))
    _give_up_output()
    _leave(code, [thread for thread in threading.enumerate() if thread not in before])


def _give_up_output() -> None:
    """Drop what stdout and stderr cannot write, so that it does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave(code: int, threads: Sequence[threading.Thread]) -> None:
    """End the process with this code, without waiting for threads that do not end."""
    last = time.monotonic() + THREAD_SECONDS
    for thread in threads:
        thread.join(max(0, last - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    if code:
        raise typer.Exit(code)


@app.command()
def chat(
    url: Annotated[
        str, typer.Option(help="The server's address, or unix:PATH.", envvar="TRIMTAB_URL")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The served model, or an alias such as demo:warm@0.8.")] = "",
    system: Annotated[str, typer.Option(help="The first system message.")] = "",
    api_key: Annotated[
        str,
        typer.Option(help="The key, if the server requires one; better in the environment.", envvar="TRIMTAB_API_KEY"),
    ] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes replies reproducible.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The maximum number of tokens of a reply.")] = None,
) -> None:
    """Chat with a running server in the terminal, and change the steering as you go. Reads lines from a pipe too."""
    from server.chat.conversation import Sampling
    from server.chat.terminal import chat as talk

    try:
        well = talk(url, api_key, model, system, Sampling(temperature, seed, max_tokens))
    except KeyboardInterrupt as stop:
        raise typer.Exit(INTERRUPTED) from stop
    if not well:
        raise typer.Exit(FAILED)


app.add_typer(profiles, name="profiles")
app.add_typer(keys, name="keys")
app.add_typer(feedback, name="feedback")
app.add_typer(jobs, name="jobs")
register_learning(app)
register_amplify(app)
register(app)


def main() -> None:
    """The console command: a `TrimtabError` is one line and exit code 2, a Ctrl-C one line and exit code 130."""
    keep_freed_memory()
    try:
        with spinning_unless_shared():
            app()
    except TrimtabError as error:
        from server.settings import Settings

        print(f"error: {with_flags(str(error), Settings.model_fields)}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:  # before a command has begun; each handles its own afterwards
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


async def _serve(settings: Settings, listener: socket.socket) -> int:
    """Serve until stopped; returns the exit code. Raises the error if the model or the profiles cannot be loaded."""
    import torch

    from server.app import create_app
    from server.http.connections import ConnectionLimits, raise_descriptor_limit
    from server.http.listener import Server, tls_options, url_of
    from server.observability.logs import set_up_transformers_logs
    from steering_vectors.runtime.cpu.threads import processors

    set_up_transformers_logs(settings.log_format)
    # the engine gets all processors; see steering_vectors.runtime.cpu.threads
    settings = settings.model_copy(update={"threads": settings.threads or processors()})
    torch.set_num_threads(1)
    tls = tls_options(settings)
    application = create_app(settings)
    service = application.state.service
    fitting = raise_descriptor_limit()
    connections = settings.max_connections or fitting
    if connections < settings.slots + settings.max_queue:
        message = "%d connections are fewer than the generations that may run and wait: raise the limit of open files"
        logging.getLogger(__name__).warning(message, connections)
    server = Server(
        application,
        end=service.close,
        drain=service.drain,
        grace=settings.drain_seconds,
        limits=ConnectionLimits(
            header_bytes=settings.max_header_bytes,
            header_fields=settings.max_header_fields,
            header_seconds=settings.header_timeout_seconds,
            body_seconds=settings.body_timeout_seconds,
            body_rate=settings.min_body_rate,
            write_seconds=settings.write_timeout_seconds,
            connections=connections,
        ),
        tls=tls,
    )
    address = url_of(settings.host, listener, tls=bool(tls))
    announcing = asyncio.create_task(_announce(service, address, server.stop))
    watching = asyncio.create_task(_watch(service, partial(server.stop, at_once=True)))
    await server.serve(sockets=[listener])
    if announcing.done():
        try:
            announcing.result()
        except TrimtabError:
            raise
        except Exception:  # logged where it was raised
            return ENGINE_FAILED
    announcing.cancel()
    return ENGINE_FAILED if watching.done() else 0


async def _watch(service: Service, stop: Callable[[], None]) -> None:
    """Return once the engine cannot go on, and stop the server then."""
    while (problem := service.problem) is None:
        await asyncio.sleep(WATCH_SECONDS)
    logging.getLogger(__name__).critical("the server ends with exit code %d: %s", ENGINE_FAILED, problem)
    await asyncio.sleep(UNHEALTHY_SECONDS)
    stop()


async def _announce(service: Service, url: str, stop: Callable[[], None]) -> None:
    try:
        await service.wait_ready()
    except Exception:
        stop()
        raise
    gc.collect()
    gc.freeze()  # collections would stall streams to look at the million objects that are loaded
    count = len(service.registry.served)
    profiles = "1 profile" if count == 1 else f"{count} profiles"
    with suppress(OSError):  # a full disk, or nobody reads it
        print(f"trimtab serves {service.model_name} with {profiles} on {url}", flush=True)


if __name__ == "__main__":
    main()
