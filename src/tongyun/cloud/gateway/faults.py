"""OpenAI's error object, and the HTTP status that goes with each way to fail.

RequestError            400
└── Refused               its own status: 401, 404, 405, 413, 503
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import ValidationError

from tongyun.errors import RequestError

_TYPES = {401: "authentication_error", 404: "invalid_request_error", 500: "server_error", 503: "server_error"}


class Refused(RequestError):
    """A refusal whose HTTP status is not 400."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


def status_of(fault: RequestError) -> int:
    return fault.status if isinstance(fault, Refused) else 400


def fault_object(fault: RequestError) -> dict[str, Mapping[str, object]]:
    """`{"error": {message, type, param, code}}`."""
    kind = _TYPES.get(status_of(fault), "invalid_request_error")
    return {"error": {"message": str(fault), "type": kind, "param": fault.param, "code": fault.code}}


def fault_bytes(fault: RequestError) -> bytes:
    return json.dumps(fault_object(fault)).encode()


def from_validation(error: ValidationError) -> RequestError:
    """The first problem pydantic found, with the field's path, and every form the field may take."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {first['msg']}", code="invalid_json")
    path = _path(first["loc"])
    if first["type"] == "missing":
        return RequestError(f"you must provide '{path}'", param=path, code="missing_required_parameter")
    told = dict.fromkeys(_lower(p["msg"]) for p in problems if _path(p["loc"]) == path)
    return RequestError(f"'{path}': {'; or '.join(told)}", param=path or None, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages.0.content`: up to where pydantic begins to name the branch of a union it tried."""
    parts: list[str] = []
    for part in loc:
        branch = isinstance(part, str) and not (part.isidentifier() and part.islower())
        if branch or part in ("str", "int"):
            break
        parts.append(str(part))
    return ".".join(parts)


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
