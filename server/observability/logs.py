"""Log lines as text or JSON, with the id of the request that they belong to."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["text", "json"]
ACCESS = "server.access"
PLAIN = re.compile(r"[A-Za-z0-9_./:@+#-]+")  # shown without quotes


def set_up_logs(form: LogFormat, level: str) -> None:
    """Log to stderr, whatever logged before; uvicorn's own messages below warnings at level debug only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(form == "json")
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def set_up_transformers_logs(form: LogFormat) -> None:
    """Draw progress bars in a terminal only. As JSON, let the messages of transformers, which has a handler of its own,
    reach ours."""
    from transformers.utils import logging as of_transformers

    if form == "json" or not sys.stderr.isatty():
        of_transformers.disable_progress_bar()
    if form == "json":
        of_transformers.disable_default_handler()
        of_transformers.enable_propagation()


def formatter(form: LogFormat) -> logging.Formatter:
    """Formats the records of every logger, also those of libraries."""
    if form == "json":
        chain: list[Processor] = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.EventRenamer("message"),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ]
    else:
        chain = [
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _text,
        ]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=SHARED, processors=chain)


def _without_colours(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """uvicorn adds its messages a second time, with colours."""
    event.pop("color_message", None)
    return event


SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.stdlib.ExtraAdder(),
    _without_colours,
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
)


def _text(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """`2026-11-30 11:25:21 INFO server.state: message name=value`, then the traceback if there is one."""
    fields = dict(event)
    head = f"{fields.pop('timestamp')} {fields.pop('level').upper()} {fields.pop('logger')}: {fields.pop('event')}"
    rest = [str(fields.pop(name)) for name in ("exception", "stack") if name in fields]
    return "\n".join([" ".join([head, *(f"{name}={_value(value)}" for name, value in fields.items())]), *rest])


def _value(value: Any) -> str:
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else json.dumps(value, default=str)
