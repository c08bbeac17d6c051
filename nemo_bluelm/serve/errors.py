"""What a client is told when it gets no reply, in the shape of OpenAI's API."""

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no reply.

    Args:
        status: of HTTP.
        code: for programs.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    @property
    def body(self) -> dict:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "code": self.code}}


def bad_request(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, code)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", "shutting_down", {"Retry-After": "10", "Connection": "close"})
