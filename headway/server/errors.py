"""Requests that are refused, and how an error is written."""

import json

from headway.config import UsageError


class BadRequest(UsageError):
    """A request that is refused. `status` is that of HTTP, `param` the field, `code` OpenAI's."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


def error_json(error: UsageError) -> str:
    """Return an error in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""
    status, param, code = 400, None, None
    if isinstance(error, BadRequest):
        status, param, code = error.status, error.param, error.code
    message = " ".join(str(error).split())
    kind = _TYPES.get(status, "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
