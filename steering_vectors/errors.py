"""Every error that trimtab raises on purpose.

    TrimtabError
    ├── ProfileError        a profile file or object is unusable
    │   └── ProfileMismatch     it was fitted on another model
    ├── DataError           a row of preference data is unusable
    ├── ModelError          a model or tokenizer cannot be loaded or steered
    ├── FitError            fitting or calibration cannot be carried out
    └── RequestError        a request asks for something that cannot be done
        └── SteeringError       its steering is not valid

Messages say what is wrong and what to do. `param` names the field that is wrong, `code` is a stable word for programs.
The errors that only a server has are in `server.engines.errors`.
"""

from __future__ import annotations


class TrimtabError(Exception):
    """Base class of all errors raised on purpose. The message is written for the user."""

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ProfileError(TrimtabError):
    code = "invalid_profile"


class ProfileMismatch(ProfileError):
    code = "profile_model_mismatch"


class DataError(TrimtabError):
    """A bad row, located by `path`, `line` (1-based; the row number in columnar files) and `field`."""

    code = "invalid_data"

    def __init__(
        self, message: str, *, path: str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        place = ", ".join(
            part
            for part in (path, f"line {line}" if line is not None else None, f"field {field!r}" if field else None)
            if part
        )
        super().__init__(f"{place}: {message}" if place else message)
        self.path, self.line, self.field = path, line, field


class ModelError(TrimtabError):
    code = "invalid_model"


class FitError(TrimtabError):
    code = "fit_failed"


class RequestError(TrimtabError):
    code = "invalid_request"


class SteeringError(RequestError):
    code = "invalid_steering"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
