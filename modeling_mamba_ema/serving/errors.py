"""What is refused, with its status and its reason."""

from collections.abc import Sequence
from typing import Any


class Refusal(Exception):
    """A request that cannot be answered: a status of HTTP (503 where the same request may be sent again) and a
    sentence."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


def in_words(errors: Sequence[Any]) -> str:
    """What pydantic found wrong, in one line: `query.window: Input should be less than or equal to 30`."""
    return "; ".join(": ".join(filter(None, (".".join(map(str, error["loc"])), error["msg"]))) for error in errors)
