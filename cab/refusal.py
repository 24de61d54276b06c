"""One line for the user from what a library says against the user's names and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import safetensors

from cab.config import UserError


@contextmanager
def refused(expected: str = "") -> Iterator[None]:
    """Turn an error into a :class:`UserError` that says what was expected and, as what came, the error's own text."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, AssertionError, OSError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{expected}, got: {reason}" if expected else reason) from error
