"""Write docs/api.md from the server's OpenAPI document; with --check, fail if the page is out of date.

    python scripts/api_docs.py [--check]

The page contains only what the application declares. No route or field is named here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from server.api.document import FILE
from server.api.fields.body import NO_OPS_KEY, NULL
from server.app import create_app
from server.settings import Settings

Json = dict[str, Any]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
ADDRESS = "http://127.0.0.1:8000"
HEADING = "<!-- Written by scripts/api_docs.py: run `make docs`, do not edit. -->\n\n# HTTP API"
WHERE = (
    "A running server shows the same at `/docs`, where requests can be tried, and as a document at `/openapi.json`. "
    "A field that may be left out may also be null, which says the same."
)
WIDTH = 110
HUGE = 2**53
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the page differs.")] = False,
) -> None:
    page = render(create_app(Settings()).openapi())
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.name} is not what the server's routes say: run `make docs`")


def render(document: Json) -> str:
    """The whole page, in Markdown."""
    parts = [HEADING, WHERE, document["info"]["description"]]
    for tag in document["tags"]:
        parts += [f"## {tag['name'][0].upper()}{tag['name'][1:]}", tag["description"]]
        parts += [part for route in _routes(document, tag["name"]) for part in _route(document, *route)]
    parts += [
        "## Objects",
        "What bodies, answers and events are made of; in answers and events, required fields are always there.",
    ]
    bodies = {_name(_body(route)) for _, _, route in _routes(document) if "requestBody" in route}
    for name, schema in sorted(document["components"]["schemas"].items()):
        if name not in bodies:
            parts += [f"### {name}", *_object(schema)]
    return "\n\n".join(parts) + "\n"


def _routes(document: Json, tag: str | None = None) -> Iterator[tuple[str, str, Json]]:
    for path, operations in document["paths"].items():
        for method, route in operations.items():
            if tag is None or tag in route["tags"]:
                yield path, method.upper(), route


def _route(document: Json, path: str, method: str, route: Json) -> Iterator[str]:
    yield f"### {method} {path}"
    yield " ".join(route["description"].split())
    yield _curl(document, path, method, route)
    if "parameters" in route:
        yield _table(_parameters(route))
    if FILE in route.get("requestBody", {}).get("content", {}):
        yield f"The body: {route['requestBody']['description']}"
    elif "requestBody" in route:
        yield from _object(_schema(document, _body(route)))[1:]
    yield from _answer(route["responses"])
    yield _errors(route["responses"])


def _curl(document: Json, path: str, method: str, route: Json) -> str:
    for parameter in route.get("parameters", []):
        examples = parameter["schema"].get("examples", [parameter["name"].upper()])
        path = path.replace(f"{{{parameter['name']}}}", str(examples[0]))
    words = f"curl -s {'' if method == 'GET' else f'-X {method} '}{ADDRESS}{path}"
    if FILE in route.get("requestBody", {}).get("content", {}):
        words += " --data-binary @warm.safetensors"
    elif "requestBody" in route:
        example = _schema(document, _body(route)).get("examples", [{}])[0]
        words += f" -H 'content-type: application/json' -d '{json.dumps(example, ensure_ascii=False)}'"
    return f"```bash\n{words}\n```"


def _answer(responses: Json) -> Iterator[str]:
    content = next((one for status, one in responses.items() if _is_success(status)), {}).get("content", {})
    named = [f"Answers {_type(content['application/json']['schema'])}"] if "application/json" in content else []
    if "text/event-stream" in content:
        event = content["text/event-stream"].get("itemSchema", {}).get("properties", {}).get("data", {})
        form = next((one for one in event.get("anyOf", [event]) if "contentSchema" in one), {})
        named.append(f"as a stream, events of {_type(form.get('contentSchema', {}))}")
    if named:
        yield "; ".join(named) + "."
    example = content.get("application/json", {}).get("example")
    if example is not None:
        yield f"```json\n{_json(example)}\n```"
    if FILE in content:
        yield "Answers a file."
    if "text/plain" in content:
        yield f"Answers text:\n\n```\n{content['text/plain']['example'].strip()}\n```"


def _errors(responses: Json) -> str:
    errors = sorted((status, one) for status, one in responses.items() if not _is_success(status))
    rows = [[("others" if status == "default" else status), one["description"]] for status, one in errors]
    return _table([["error", "when"], *rows])


def _is_success(status: str) -> bool:
    return status.startswith("2")


def _object(schema: Json) -> list[str]:
    """The description of an object, the table of its fields, and the ignored fields."""
    required = schema.get("required", [])
    rows = [
        [
            f"`{name}`",
            _type(field if name in required else _without_null(field)),
            _default(field, name in required),
            _meaning(field),
        ]
        for name, field in sorted(schema.get("properties", {}).items(), key=lambda item: item[0] not in required)
    ]
    parts = [" ".join(schema.get("description", "").split())]
    parts += [_table([["field", "type", "default", "meaning"], *rows])] if rows else []
    if NO_OPS_KEY in schema:
        fields = [_accepted(name, values) for name, values in schema[NO_OPS_KEY].items()]
        parts.append(f"Not supported, and accepted only as null or as what asks for nothing: {', '.join(fields)}.")
    return parts


def _without_null(field: Json) -> Json:
    """The schema of an optional field without null. The page says once that null equals leaving a field out."""
    forms = [form for form in field.get("anyOf", []) if form != NULL]
    return {**field, "anyOf": forms} if forms else field


def _accepted(name: str, values: list[Any]) -> str:
    shown = " or ".join(f"`{json.dumps(value)}`" for value in values)
    return f"`{name}` ({shown})" if values else f"`{name}`"


def _parameters(route: Json) -> list[list[str]]:
    rows = [
        [f"`{one['name']}`", one["in"], _type(one["schema"]), one.get("description", "")] for one in route["parameters"]
    ]
    return [["parameter", "in", "type", "meaning"], *rows]


def _meaning(field: Json) -> str:
    examples = " or ".join(f"`{json.dumps(one)}`" for one in field.get("examples", []))
    return f"{field.get('description', '')}{f' For example {examples}.' if examples else ''}"


def _default(field: Json, required: bool) -> str:
    if required:
        return "required"
    return f"`{json.dumps(field['default'])}`" if field.get("default") not in (None, "", []) else ""


def _type(schema: Json) -> str:
    """The type of a schema in words, with links to objects."""
    if "$ref" in schema:
        return f"[{_name(schema)}](#{_name(schema).lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema.get("type") == "array":
        return f"list of ({inner})" if " or " in (inner := _type(schema.get("items", {}))) else f"list of {inner}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), None)
        return f"object of {_type(values)}" if isinstance(values, dict) and values else "object"
    limits = [f"{sign} {schema[name]:g}" for name, sign in LIMITS.items() if abs(schema.get(name, HUGE)) < HUGE]
    return " ".join([schema.get("type", "any"), ", ".join(limits)]).strip()


def _json(value: Any, indent: str = "") -> str:
    """Format JSON with a limited line width. A value that fits is written on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(indent + line) <= WIDTH or not isinstance(value, (dict, list)):
        return line
    deeper, (opening, closing) = f"{indent}  ", "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        parts = [f"{deeper}{json.dumps(key)}: {_json(item, deeper)}" for key, item in value.items()]
    else:
        parts = [f"{deeper}{_json(item, deeper)}" for item in value]
    return "\n".join([opening, ",\n".join(parts), f"{indent}{closing}"])


def _body(route: Json) -> Json:
    content: Json = route["requestBody"]["content"]
    schema: Json = next(iter(content.values()))["schema"]
    return schema


def _name(schema: Json) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _schema(document: Json, schema: Json) -> Json:
    found: Json = document["components"]["schemas"].get(_name(schema), schema)
    return found


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


if __name__ == "__main__":
    typer.run(main)
