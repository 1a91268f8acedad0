"""A folder of work in steps: JSON Lines that can be edited, and a record of what was made from what.

Rows that models write are appended as they come, each under a key of all that it depends on, so a run that was killed
goes on where it was, and a change makes only what depends on it again. A file that is made from another one is left as
it is while that one does not change, also after it was edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steering_vectors.errors import DataError

Row = dict[str, Any]
RECORD, LOCK = "steps.json", ".lock"
KEY_DIGITS = 16


def key_of(*parts: object) -> str:
    """A short hash of values that JSON can hold."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_DIGITS]


class Folder:
    """The files of one piece of work. `with folder:` keeps other processes out. Raises DataError for a file that cannot
    be read or written, with its path and line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK, timeout=0)

    def __enter__(self) -> Folder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise DataError(f"another process works in {self.path}: wait for it, or name another folder") from error
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}): name another folder") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    def sha256(self, name: str) -> str:
        """The hash of a file's bytes, an empty text if it does not exist."""
        path = self.file(name)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def rows(self, name: str, fields: Sequence[str] = ()) -> list[Row]:
        """The rows of a file, none if it does not exist. Each must have texts in these fields that are not blank.

        A last line that a killed run left unfinished is not read.
        """
        path, found = self.file(name), []
        if not path.is_file():
            return []
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("the file cannot be read as UTF-8", path=str(path)) from error
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    break
                raise DataError(f"it is no JSON ({error})", path=str(path), line=number) from error
            found.append(_checked(row, fields, str(path), number))
        return found

    def append(self, name: str, rows: Iterable[Row]) -> None:
        """Add rows at the end of a file, and bring them to disk."""
        path = self.file(name)
        whole = _whole_lines(path)
        with path.open("a", encoding="utf-8") as file:
            if not whole:
                file.write("\n")
            for row in rows:
                file.write(_line(row))
                file.flush()

    def write(self, name: str, rows: Iterable[Row]) -> None:
        """Write a file, whole or not at all."""
        self._replace(name, "".join(map(_line, rows)))

    def values(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, an empty one if it does not exist."""
        path = self.file(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError) as error:
            raise DataError("it cannot be read as JSON: correct or delete it", path=str(path)) from error
        if not isinstance(found, dict):
            raise DataError("it holds no JSON object: correct or delete it", path=str(path))
        return found

    def set_values(self, name: str, values: Mapping[str, Any]) -> None:
        self._replace(name, json.dumps(values, ensure_ascii=False, indent=2) + "\n")

    def made(self, name: str, inputs: str, make: Callable[[], Iterable[Row]]) -> bool:
        """Make a file from `inputs`, a hash of what it depends on, unless that was done. Returns whether it was made.

        Raises DataError if the inputs changed after somebody edited the file, because one of both would be lost.
        """
        record, present = self.values(RECORD), self.sha256(name)
        known = record.get(name, {})
        if present and known.get("inputs") == inputs:
            return False
        if present and known and present != known.get("output"):
            raise DataError(
                f"{self.file(name)} was edited, and what it is made from has changed since: delete it to make it "
                "again, or undo the change"
            )
        if present and not known:
            raise DataError(f"{self.file(name)} was not made here: delete it, or name another folder")
        self.write(name, make())
        self.set_values(RECORD, {**record, name: {"inputs": inputs, "output": self.sha256(name)}})
        return True

    def _replace(self, name: str, text: str) -> None:
        path = self.file(name)
        partial = path.with_name(f".{name}.part")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror})") from error


def is_storable(text: str) -> bool:
    """Whether a text can be written as UTF-8: one with half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def by_key(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by their keys; of equal keys the last one holds."""
    return {row["key"]: row for row in rows}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _checked(row: Any, fields: Sequence[str], path: str, line: int) -> Row:
    if not isinstance(row, dict):
        raise DataError("the line is no JSON object", path=path, line=line)
    if not is_storable(_line(row)):
        raise DataError("it contains half of a surrogate pair: correct or delete the line", path=path, line=line)
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError("it must be a text that is not blank", path=path, line=line, field=field)
    return row


def _whole_lines(path: Path) -> bool:
    """Whether a file's last line is whole. One that is no JSON is cut off: a killed run left it."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if file.read() == b"\n":
            return True
        file.seek(0)
        head, newline, tail = file.read().rpartition(b"\n")
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(len(head) + len(newline))
            return True
    return False
