"""One line for the user from what a library says against the user's names and numbers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from zipfile import BadZipFile

import safetensors

from cab.config import UserError

LONGEST = 300  # characters: transformers names all its models against one that it does not know

# What libraries raise against what they are given, and against files that are damaged.
_OF_VALUES = (ValueError, RuntimeError, TypeError, AssertionError)
_OF_FILES = (OSError, EOFError, LookupError, pickle.UnpicklingError, BadZipFile, safetensors.SafetensorError)


@contextmanager
def refused(expected: str = "") -> Iterator[None]:
    """Turn an error into a :class:`UserError` that says what was expected and, as what came, the error's own text."""
    try:
        yield
    except (*_OF_VALUES, *_OF_FILES) as error:
        reason = " ".join(str(error).split())
        if len(reason) > LONGEST:
            reason = f"{reason[:LONGEST].rstrip()} ..."
        if not reason or isinstance(error, LookupError):  # of which the text is a key alone
            reason = f"{type(error).__name__} {reason}".rstrip()
        raise UserError(f"{expected}, got: {reason}" if expected else reason) from error
