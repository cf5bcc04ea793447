"""Everything that Helena itself raises, and the exit codes of its commands.

    HelenaError                     1
    ├── InvalidOperation            2   (also a ValueError)
    ├── UsageError                  2
    ├── ConfigurationError          3
    │   ├── NamespaceClaimed        3
    │   └── SchemaMissing           3
    ├── SpoolError                  1
    │   ├── SpoolFull               1
    │   └── SpoolUnavailable        3
    ├── DatabaseUnreachable         4
    ├── DatabaseRefused             1
    └── Refused                     5

An error says what happened; its `remedy` says what to do now. Anything else that escapes is a bug
(70).
"""

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a command's exit status means."""

    DONE = 0
    PARTIAL = 1
    USAGE = 2
    CONFIGURATION = 3
    UNREACHABLE = 4
    REFUSED = 5
    BUG = 70
    INTERRUPTED = 130


class HelenaError(Exception):
    """The base of the family: a message, and a remedy for the person who reads it."""

    exit_code: ClassVar[ExitCode] = ExitCode.PARTIAL

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class InvalidOperation(HelenaError, ValueError):
    """An operation was refused at the call; nothing was queued. `field` names the culprit."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, *, field: str, remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.field = field


class UsageError(HelenaError):
    """The command line asks for something that makes no sense."""

    exit_code = ExitCode.USAGE


class ConfigurationError(HelenaError):
    """A setting is unknown, mistyped or contradicts another."""

    exit_code = ExitCode.CONFIGURATION


class NamespaceClaimed(ConfigurationError):
    """The namespace of a document root belongs to another folder or host."""


class SchemaMissing(ConfigurationError):
    """Helena's own tables are absent, or of another version."""


class SpoolError(HelenaError):
    """The local queue could not take or give an operation."""


class SpoolFull(SpoolError):
    """The queue reached its limit, or the disk is full; the operation was not accepted."""


class SpoolUnavailable(SpoolError):
    """The state directory cannot be used at all."""

    exit_code = ExitCode.CONFIGURATION


class DatabaseUnreachable(HelenaError):
    """No connection to the database could be made, or it was lost."""

    exit_code = ExitCode.UNREACHABLE


class DatabaseRefused(HelenaError):
    """The database answered, and said no. `sqlstate` is its five-character code."""

    def __init__(self, message: str, *, remedy: str, sqlstate: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.sqlstate = sqlstate


class Refused(HelenaError):
    """The person said no, or could not be asked."""

    exit_code = ExitCode.REFUSED
