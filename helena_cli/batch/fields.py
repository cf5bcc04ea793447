"""What may stand in the fields of a record: annotations for a type checker and for the call.

Each annotation carries its check, which returns what is to be stored or raises Unfit.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_origin
from uuid import UUID

Check = Callable[[Any], Any]


class Unfit(Exception):
    """The value does not fit its field; the text is the reason."""


def _text(value: Any) -> Any:
    if not isinstance(value, str | UUID):
        raise Unfit(f"it must be text, not {kind_of(value)}")
    return value


def _name(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise Unfit("it is empty")
    return _text(value)


def _classification(value: Any) -> Any:
    if value not in CLASSIFICATIONS:
        raise Unfit(f"{value!r} is not one of {', '.join(CLASSIFICATIONS)}")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise Unfit(f"it must be a number, not {kind_of(value)}")
    return value


def _integer(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit(f"it must be a whole number, not {kind_of(value)}")
    return value


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise Unfit(f"it must be True or False, not {kind_of(value)}")
    return value


def _time(value: Any) -> Any:
    """Text is read here: into a column without time zone PostgreSQL would drop its offset."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise Unfit(f"{value!r} is not a time in ISO 8601") from None
    if not isinstance(value, date):
        raise Unfit(f"it must be a datetime, or its text in ISO 8601, not {kind_of(value)}")
    return value


def _tags(value: Any) -> Any:
    if not isinstance(value, list | tuple | set | frozenset):
        raise Unfit(f"it must be a list of texts, not {kind_of(value)}")
    for tag in value:
        if not isinstance(tag, str):
            raise Unfit(f"each tag must be text, not {kind_of(tag)}")
    return value


def _json(value: Any) -> Any:
    if isinstance(value, str | bytes | bytearray):
        raise Unfit(f"it is JSON: give the mapping or list itself, not {kind_of(value)}")
    return value


def _document(value: Any) -> Any:
    if not isinstance(_json(value), Mapping | list | tuple):
        raise Unfit(f"it must be a mapping or a list, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a person calls the type of a value."""
    return "text" if isinstance(value, str) else type(value).__name__


Text = Annotated[str | UUID, _text]
Name = Annotated[str | UUID, _name]
Number = Annotated[int | float | Decimal, _number]
Integer = Annotated[int, _integer]
Flag = Annotated[bool, _flag]
Time = Annotated[datetime | date | str, _time]
Tags = Annotated[Collection[str], _tags]
Json = Annotated[object, _json]
Document = Annotated[Mapping[str, Any] | Sequence[Any], _document]
Level = Literal["public", "confidential", "internal", "restricted"]
Classification = Annotated[Level, _classification]
CLASSIFICATIONS: tuple[str, ...] = get_args(Level)


def check_of(hint: Any) -> Check:
    """The check that an annotation carries, perhaps beside None or within Required."""
    if get_origin(hint) is Annotated:
        check: Check = hint.__metadata__[0]
        return check
    return next(check_of(part) for part in get_args(hint))
