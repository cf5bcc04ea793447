"""An operation: one row that somebody wants to have in a table, as JSON."""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, get_args
from uuid import UUID

import msgspec

from helena_cli.errors import InvalidOperation

Kind = Literal["insert", "update", "message"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Characters of a table's name, far beyond what PostgreSQL looks at.
LONGEST_NAME = 1000

_encode = msgspec.json.Encoder(decimal_format="number").encode


class Operation(msgspec.Struct, frozen=True, gc=False):
    """An accepted operation as it lies in the spool."""

    #: Grows with acceptance; about the Unix time of acceptance in microseconds.
    id: int
    kind: Kind
    #: `name` or `schema.name`, as the caller gave it; also the name of its lane.
    table: str
    #: One JSON object, column → value, UTF-8.
    data: bytes
    #: How often a flush tried it and put it back.
    attempts: int = 0
    #: Unix time of the first time it was put back, None when it never was.
    held_since: float | None = None
    #: False while a held operation waits for its next attempt: then it only blocks its key.
    due: bool = True

    def columns(self) -> dict[str, msgspec.Raw]:
        """The values by column, each still encoded."""
        return _decode_columns(self.data)


_decode_columns = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def encode(kind: Any, table: Any, data: Any, *, max_bytes: int) -> bytes:
    """Check an operation and return its data as JSON.

    Aware datetimes become UTC, bytes become PostgreSQL's hex text, sets become arrays. Raises
    InvalidOperation, which names the field, for whatever PostgreSQL could never store.
    """
    if kind not in KINDS:
        raise _invalid("kind", f"{kind!r} is not one of {', '.join(KINDS)}")
    if not isinstance(table, str):
        raise _invalid("table", f"it must be text, not {type(table).__name__}")
    _check_table(table)
    try:
        encoded = _encode_plain(data) if type(data) is dict else None
        if encoded is None:
            _check_columns(data)
            encoded = _encode({column: _plain(value, column) for column, value in data.items()})
    except RecursionError:
        raise _invalid("data", "it is nested too deeply, or contains itself") from None
    except UnicodeEncodeError:
        raise _invalid("data", "a column name contains a lone surrogate") from None
    if len(encoded) > max_bytes:
        raise _invalid("data", f"{len(encoded):,} bytes of JSON; the limit is {max_bytes:,} bytes")
    return encoded


def _encode_plain(data: dict[Any, Any]) -> bytes | None:
    """Encode at once what needs no conversion, which is nearly everything; None for the rest."""
    if not data or "" in data or not _are_plain((data,)):
        return None
    try:
        encoded = _encode(data)
    except (UnicodeEncodeError, ValueError):
        # A lone surrogate or an endless number.
        return None
    # NUL becomes an escape. Most have none at all, and a single byte is found sooner.
    return None if b"\\" in encoded and b"\\u0000" in encoded else encoded


def _are_plain(values: Iterable[Any]) -> bool:
    for value in values:
        # The types one by one: with a call for each value this was a third of a caller's time.
        kind = type(value)
        if kind is str or kind is int or kind is bool or value is None:
            continue
        if kind is float:
            # Not NaN and no infinity, for which JSON has no form.
            if value - value != 0:
                return False
        elif kind is dict:
            for key in value:
                if type(key) is not str:
                    return False
            if not _are_plain(value.values()):
                return False
        elif kind is not list or not _are_plain(value):
            return False
    return True


def _check_columns(data: Any) -> None:
    if not isinstance(data, Mapping) or not data:
        raise _invalid("data", "it must be a mapping of column to value with at least one column")
    for column in data:
        if not isinstance(column, str) or not column or "\0" in column:
            raise _invalid("data", f"{column!r} is not a column name")


@lru_cache(maxsize=256)
def _check_table(table: str) -> None:
    """`name` or `schema.name`.

    Anything longer than PostgreSQL's identifiers is cut there, so not here.
    """
    parts = table.split(".")
    if len(table) > LONGEST_NAME:
        raise _invalid("table", f"its name has {len(table):,} characters")
    if len(parts) > 2 or not all(part.strip() for part in parts):
        raise _invalid("table", f"{table!r} is neither a table's name nor schema.name")
    _check_text(table, "table")


def _plain(value: Any, path: str) -> Any:
    """The value in types that the encoder writes as PostgreSQL reads them."""
    if value is None or value is True or value is False:
        return value
    convert = _CONVERT.get(type(value))
    if convert is None:
        convert = next((_CONVERT[t] for t in _CONVERT if isinstance(value, t)), None)
    if convert is None:
        if isinstance(value, Mapping):
            convert = _mapping
        else:
            raise _invalid(path, f"a {type(value).__name__} has no form in JSON")
    return convert(value, path)


def _text(value: str, path: str) -> str:
    if not value.isascii() or "\0" in value:
        _check_text(value, path)
    # The text itself: str() of an enumeration's member is its name.
    return str.__str__(value)


def _check_text(value: str, path: str) -> None:
    if "\0" in value:
        raise _invalid(path, "PostgreSQL stores no NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _invalid(path, "it contains a lone surrogate, which is not Unicode text") from None


def _integer(value: int, path: str) -> Any:
    number = int(value)
    return number if -(2**63) <= number < 2**64 else msgspec.Raw(_digits(number, path).encode())


def _digits(number: int, path: str) -> str:
    try:
        return str(number)
    except ValueError:
        raise _invalid(path, "the number has too many digits") from None


def _float(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise _invalid(path, f"JSON has no {value}")
    return float(value)


def _decimal(value: Decimal, path: str) -> Decimal:
    if not value.is_finite():
        raise _invalid(path, f"JSON has no {value}")
    return Decimal(value)


def _datetime(value: datetime, path: str) -> str:
    # A time zone without an offset makes no aware time: astimezone would take it for local.
    if value.utcoffset() is None:
        return datetime.isoformat(value.replace(tzinfo=None))
    try:
        return datetime.isoformat(value.astimezone(UTC).replace(tzinfo=None)) + "Z"
    except OverflowError:
        raise _invalid(path, f"{value} lies outside the calendar in UTC") from None


def _interval(value: timedelta, _: str) -> str:
    # PostgreSQL takes a sign at each part, and none before the P.
    return f"P{value.days}DT{value.seconds}.{value.microseconds:06}S"


def _bytes(value: Any, _: str) -> str:
    return "\\x" + bytes(value).hex()


def _list(value: Any, path: str) -> list[Any]:
    return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]


def _mapping(value: Mapping[Any, Any], path: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise _invalid(path, f"the key {key!r} is not text")
        name = _text(key, path) if isinstance(key, str) else _digits(int(key), path)
        if name in plain:
            raise _invalid(path, f"two of its keys are {name!r}")
        plain[name] = _plain(item, f"{path}.{name}")
    return plain


_CONVERT: dict[type, Any] = {
    str: _text,
    int: _integer,
    float: _float,
    dict: _mapping,
    list: _list,
    tuple: _list,
    set: _list,
    frozenset: _list,
    datetime: _datetime,
    date: lambda value, _: date.isoformat(value),
    time: lambda value, _: time.isoformat(value),
    timedelta: _interval,
    UUID: lambda value, _: UUID.__str__(value),
    Decimal: _decimal,
    bytes: _bytes,
    bytearray: _bytes,
    memoryview: _bytes,
}


def _invalid(field: str, reason: str) -> InvalidOperation:
    return InvalidOperation(
        f"The operation was refused: {field}: {reason}.",
        field=field,
        remedy="Nothing was queued. Mend the value and call again.",
    )
