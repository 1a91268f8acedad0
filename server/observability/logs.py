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
PLAIN = re.compile(r"[^\s\"'\\{}\[\]=\x00-\x1f]+")

SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.stdlib.ExtraAdder(),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
)


def set_up_logs(form: LogFormat, level: str) -> None:
    """Log to stderr, whatever logged before; uvicorn's own messages below warnings at level debug only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def formatter(form: LogFormat) -> logging.Formatter:
    """Formats the records of every logger, also those of libraries."""
    if form == "json":
        chain: list[Processor] = [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.EventRenamer("message"),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ]
    else:
        chain = [
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _text,
        ]
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=SHARED, processors=chain)


def _text(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """`2026-11-30 11:25:21 INFO server.state: message name=value`, then the traceback if there is one."""
    fields = dict(event)
    head = f"{fields.pop('timestamp')} {fields.pop('level').upper()} {fields.pop('logger')}: {fields.pop('event')}"
    rest = [str(fields.pop(name)) for name in ("exception", "stack") if name in fields]
    return "\n".join([" ".join([head, *(f"{name}={_value(value)}" for name, value in fields.items())]), *rest])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if PLAIN.fullmatch(text) else json.dumps(value, ensure_ascii=False, default=str)
