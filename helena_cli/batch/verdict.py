"""What the database said against an operation."""

from msgspec import Struct


class Verdict(Struct, frozen=True):
    """What the database said against one operation."""

    operation_id: int
    sqlstate: str
    message: str
    constraint: str | None = None
    #: For a foreign key: the parent table, `name` or `schema.name`.
    parent: str | None = None
