"""A table as the planner sees it: its columns, its keys, and when two values of a key are equal.

Equality is the database's, not the text's: `1` and `"1"` are one integer. Where Python cannot know
(numbers with a scale, times, collations that ignore case), the database is asked.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum
from typing import Literal

import msgspec
from msgspec import Raw, Struct

Equality = Literal["integer", "text", "uuid", "database"]


class Column(Struct, frozen=True):
    """A column. `type` and `collation` are spelled as SQL; collation None is the type's own."""

    name: str
    type: str
    #: Who can tell whether two values are equal.
    equality: Equality = "database"
    #: The n of varchar(n).
    length: int | None = None
    collation: str | None = None
    #: GENERATED ALWAYS AS IDENTITY.
    always_identity: bool = False
    #: How its JSON becomes text for COPY; None for a type where only the server knows.
    copied_as: Literal["scalar", "json", "array"] | None = None


class ForeignKey(Struct, frozen=True):
    """A foreign key. `visible`: the parent is found by its bare name."""

    constraint: str
    columns: tuple[str, ...]
    parent: int
    parent_schema: str
    parent_name: str
    visible: bool


class Table(Struct, frozen=True):
    """What the catalog says of a table. `oid` tells whether two names mean the same one."""

    oid: int
    schema: str
    name: str
    columns: tuple[Column, ...]
    #: Unique keys that can be inferred, primary first.
    keys: tuple[tuple[str, ...], ...] = ()
    foreign_keys: tuple[ForeignKey, ...] = ()
    #: Whether COPY into it means what INSERT means: no rules, no policies, no view.
    copyable: bool = False


class Special(Enum):
    """What may stand in place of a key's value."""

    NULL = "a column of the key is null"
    #: The database will refuse it, so it equals no other.
    BAD = "not a value of this type"
    UNDECIDED = "only the database knows"


_decode_text = msgspec.json.Decoder(str).decode

_INTEGER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)[ \t\n\v\f\r]*", re.ASCII)
#: What newer releases also take for an integer: 0x1F, 1_000.
_PERHAPS_INTEGER = re.compile(
    r"[ \t\n\v\f\r]*[+-]?(0[xXoObB][0-9A-Fa-f_]+|[0-9][0-9_]*)[ \t\n\v\f\r]*", re.ASCII
)
_UUID = re.compile(r"[0-9a-f]{4}(?:-?[0-9a-f]{4}){7}", re.ASCII)


def canonical(column: Column, raw: Raw) -> Hashable:
    """The value of a key's column, equal for equal values; or a `Special`."""
    encoded = bytes(raw)
    if encoded == b"null":
        return Special.NULL
    if column.equality == "database":
        return Special.UNDECIDED
    text = _decode_text(encoded) if encoded[:1] == b'"' else encoded.decode()
    if column.equality == "text":
        return _text(text, column.length)
    return _integer(text) if column.equality == "integer" else _uuid(text)


def _text(text: str, length: int | None) -> Hashable:
    if length is None or len(text) <= length:
        return text
    # Only spaces may be cut off.
    return Special.BAD if text[length:].strip(" ") else text[:length]


def _integer(text: str) -> Hashable:
    if found := _INTEGER.fullmatch(text):
        # Python refuses to read thousands of digits, and no integer has them.
        return int(found[1]) if len(found[1]) < 100 else Special.BAD
    return Special.UNDECIDED if _PERHAPS_INTEGER.fullmatch(text) else Special.BAD


def _uuid(text: str) -> Hashable:
    lower = text.lower()
    if lower.startswith("{") and lower.endswith("}"):
        lower = lower[1:-1]
    return lower.replace("-", "") if _UUID.fullmatch(lower) else Special.BAD


def key_value(columns: Sequence[Column], values: Mapping[str, Raw]) -> Hashable:
    """The value of a whole key; or a `Special`."""
    if len(columns) == 1:
        return canonical(columns[0], values[columns[0].name])
    parts = tuple(canonical(column, values[column.name]) for column in columns)
    for special in Special:
        if special in parts:
            return special
    return parts


def parents_first(tables: Sequence[Table], first_ids: Mapping[int, int]) -> list[Table]:
    """The tables in the order of their foreign keys; a cycle starts where the lowest id is.

    `first_ids`: oid → the lowest id of an operation on that table.
    """
    remaining = sorted(tables, key=lambda table: first_ids[table.oid])
    ordered = []
    while remaining:
        ancestors = _ancestors(remaining)
        # One whose ancestors are all its descendants too: it has none, or they are a cycle.
        chosen = next(
            table
            for table in remaining
            if all(table.oid in ancestors[oid] for oid in ancestors[table.oid])
        )
        remaining.remove(chosen)
        ordered.append(chosen)
    return ordered


def _ancestors(tables: Sequence[Table]) -> dict[int, set[int]]:
    """oid → parents, their parents and so on, among these tables."""
    oids = {table.oid for table in tables}
    found = {table.oid: {key.parent for key in table.foreign_keys} & oids for table in tables}
    for middle in oids:
        for reached in found.values():
            if middle in reached:
                reached |= found[middle]
    return found
