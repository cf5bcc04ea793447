"""One step of a trial, and how it may end."""

from msgspec import Struct

from helena_cli.errors import HelenaError


class Step(Struct, frozen=True):
    """One promise, whether it was kept, and what was seen."""

    name: str
    passed: bool
    detail: str
    #: Whether it could be tried; what could not does not fail by itself.
    tried: bool = True


class Failed(HelenaError):
    """A promise that was not kept."""

    def __init__(self, message: str, remedy: str = "Please report it, with what is above.") -> None:
        super().__init__(message, remedy=remedy)


class NotTried(Exception):
    """Why a promise cannot be shown here."""


def told(error: HelenaError) -> str:
    """What happened and what to do, as sentences."""
    message = str(error)
    return f"{message if message.endswith('.') else f'{message}.'} {error.remedy}".strip()
