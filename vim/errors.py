"""Errors that a person can do something about. Their text is the one line that the user reads."""

import errno
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

# System errors of storage on a network, after which a later attempt may succeed.
PASSING = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class ConfigError(ValueError):
    """Arguments that cannot work, alone or together."""


class DataError(ValueError):
    """Data that a run cannot start or go on with; the line names the path.

    A loader's worker process hands an exception on as text with its traceback; only the line is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.rstrip().rsplit("DataError: ", 1)[-1])


class LostDataError(DataError):
    """Data that could not be read for now: starting again may help."""

    transient = True


class BrokenImage(Exception):
    """One image that cannot be decoded: its name and why."""


class CheckpointError(ValueError):
    """A weight file that cannot be read, written or used; the line names it."""


class StorageError(CheckpointError):
    """A weight file that could not be written for now: starting again may help."""

    transient = True


class PeerError(RuntimeError):
    """Another rank cannot go on; raised by the ranks that could. `transient`: starting again may help."""

    transient = False


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite, and the rule is to stop."""


@contextmanager
def as_config_error(prefix: str = "", kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn an error that a user's argument caused deeper down into a ConfigError; `prefix` begins its line."""
    try:
        yield
    except ConfigError:
        raise
    except kind as error:
        raise ConfigError(prefix + one_line(error)) from error


def import_optional(name: str, needed_by: str, packages: str = "") -> ModuleType:
    """A package that `needed_by` alone needs. Raises ConfigError with the command that installs it, or `packages`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{needed_by}: {one_line(error)}; pip install {packages or name}") from error


def raise_unless_of_file(error: Exception, name: str | Path) -> None:
    """Return if a failure to read the file `name` is the file's own.

    Raises LostDataError where the storage failed and may come back, and `error` itself where this process lacks memory
    or has too many files open: another file would fare no better, and this one may be whole.
    """
    if isinstance(error, OSError) and error.errno in PASSING:
        raise LostDataError(f"{name} could not be read: {error.strerror}") from error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in TOO_MANY_OPEN):
        raise error


def one_line(error: Exception, limit: int = 1000) -> str:
    """An error's text without line breaks, at most `limit` characters of it."""
    return " ".join(str(error).split())[:limit]


def first_sentence(error: Exception | str) -> str:
    """An error's text up to the end of its first sentence or line, at most 300 characters of it."""
    return str(error).strip().partition("\n")[0].split(". ")[0].rstrip(".")[:300]


def unknown(what: str, accepted: Iterable) -> str:
    """The line for a value that is not among the accepted ones; `what` is the value and where it was given."""
    return f"{what} is unknown: use one of {', '.join(map(str, accepted))}"


def check_choice(name: str, value, accepted: Iterable) -> None:
    """Raise ValueError, naming what is accepted, for the argument `name` of a function if it is none of those."""
    if value not in accepted:
        raise ValueError(unknown(f"{name}={value!r}", map(repr, accepted)))


def nearby(names: list[str]) -> str:
    """A question to end a line with, which names what the user may have meant; "" without `names`."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def some_of(names: list[str], limit: int = 5) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
