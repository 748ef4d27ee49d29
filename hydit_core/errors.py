"""Errors that a user can act on, and how the command lines show them."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


class HyditError(Exception):
    """Base of every error that says what was found, what was expected and what to do."""


class WeightsError(HyditError):
    """A weights file that cannot be read, is of another kind, or does not fit."""


class LoraError(HyditError):
    """A LoRA that cannot be read, is of another model, or does not fit."""


class ConfigError(HyditError):
    """A configuration or command-line value that is not accepted."""


class DataError(HyditError):
    """Training data that is missing, unreadable or inconsistent."""


def cli_main(run: Callable[[], int | None]) -> int:
    """Run a command line; a :class:`HyditError` becomes ``error: ...`` on stderr and exit code 2.

    Where stdout's encoding lacks a character (a file name in Chinese, redirected on Windows), it is escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run() or 0
    except HyditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
