"""What a client is told when its request is refused."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is not answered with a prediction.

    Args:
        status: HTTP status.
        code: A word for programs, such as ``'unknown_adapter'``.
        message: A sentence for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
