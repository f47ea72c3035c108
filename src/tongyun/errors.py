"""Every error Tongyun raises on purpose.

    TongyunError
    ├── InputError            what the user gave is wrong                exit 2
    │   ├── SpecError           a TOML or config.json: file and key
    │   ├── TraceError          a trace: file and line
    │   └── RequestError        a request the server refuses (HTTP 400)
    ├── Infeasible            the question was fine, the answer is no    exit 1
    └── ServiceError          another process did not do its part        exit 1

An error names where it is, what is accepted, and the nearest accepted name, so
that the reader can mend it without opening the source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TongyunError(Exception):
    """Base of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(TongyunError):
    """What the user gave is wrong: a flag, a file, a name."""

    exit_code = 2


class SpecError(InputError):
    """A spec file is wrong: `file: key: what`."""

    def __init__(self, file: object, key: str, problem: str) -> None:
        super().__init__(f"{file}: {key}: {problem}" if key else f"{file}: {problem}")
        self.file, self.key, self.problem = str(file), key, problem


class TraceError(InputError):
    """A line of a trace is wrong: `file:line: what`."""

    def __init__(self, file: object, line: int, problem: str) -> None:
        super().__init__(f"{file}:{line}: {problem}")
        self.file, self.line, self.problem = str(file), line, problem


class RequestError(InputError):
    """A request cannot be served as asked; `param` and `code` follow OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Infeasible(TongyunError):
    """No plan meets the question; the message says which limit binds."""


class ServiceError(TongyunError):
    """A server, worker or peer process failed or did not answer."""


def unknown(what: str, given: str, accepted: Iterable[str]) -> str:
    """`unknown chip 'h20O'; did you mean h200, h20? accepted: …`, for any error's message."""
    names = sorted(accepted)
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in difflib.get_close_matches(given.lower(), lower, n=3, cutoff=0.4)]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"unknown {what} '{given}'{hint or ';'} accepted: {', '.join(names)}"
