"""What a failed statement means for a flush, by SQLSTATE. One function decides."""

from enum import Enum

import psycopg

from helena_cli.batch.flush import FlushFailed, Waiting
from helena_cli.batch.operation import Operation
from helena_cli.batch.verdict import Verdict
from helena_cli.database.connection import translate

FOREIGN_KEY_VIOLATION = "23503"
LOCK_NOT_AVAILABLE = "55P03"
QUERY_CANCELED = "57014"


class Failure(Enum):
    """Whom an error concerns."""

    TRANSIENT = "the whole flush: try again later"
    ROW = "one row: find it"
    GROUP = "every row that gives these columns"
    LANE = "the whole table: let it wait"
    PERMISSION = "single rows when at least half of their group succeeds, else the whole table"
    UNKNOWN = "nobody knows: try again, and blame the row in the end"


_WHOLE = {
    "25006": Failure.TRANSIENT,
    QUERY_CANCELED: Failure.TRANSIENT,
    "P0001": Failure.ROW,
    "42703": Failure.GROUP,
    "42804": Failure.GROUP,
    "428C9": Failure.GROUP,
    "42P10": Failure.GROUP,
    "55000": Failure.GROUP,
    "42P01": Failure.LANE,
    "3F000": Failure.LANE,
    "2200H": Failure.LANE,
    LOCK_NOT_AVAILABLE: Failure.LANE,
    "42501": Failure.PERMISSION,
}

_CLASSES = {
    "08": Failure.TRANSIENT,
    "40": Failure.TRANSIENT,
    "53": Failure.TRANSIENT,
    "57P": Failure.TRANSIENT,
    "21": Failure.ROW,
    "22": Failure.ROW,
    "23": Failure.ROW,
    "44": Failure.ROW,
    "54": Failure.ROW,
}


def classify(sqlstate: str | None) -> Failure:
    """Whom an error on a table concerns. None is a lost connection."""
    if sqlstate is None:
        return Failure.TRANSIENT
    for known in (_WHOLE.get(sqlstate), _CLASSES.get(sqlstate[:3]), _CLASSES.get(sqlstate[:2])):
        if known is not None:
            return known
    return Failure.UNKNOWN


def flush_failed(error: psycopg.Error) -> FlushFailed:
    """The end of a flush. Its cause is the error in Helena's own words."""
    cause = translate(error)
    failed = FlushFailed(
        str(cause),
        sqlstate=error.sqlstate,
        remedy=cause.remedy,
        halve=error.sqlstate == QUERY_CANCELED,
        unknown=classify(error.sqlstate) is Failure.UNKNOWN,
    )
    failed.__cause__ = cause
    return failed


def waiting(error: psycopg.Error) -> Waiting:
    """Why a lane waits."""
    return Waiting(_message(error), error.sqlstate, translate(error).remedy)


def verdict(operation: Operation, error: psycopg.Error, parent: str | None = None) -> Verdict:
    """What the database said against one operation."""
    constraint = error.diag.constraint_name
    return Verdict(operation.id, error.sqlstate or "", _message(error), constraint, parent)


def _message(error: psycopg.Error) -> str:
    """What PostgreSQL says, with its detail: that holds the values, and they may be long."""
    primary = error.diag.message_primary or str(error)
    detail = error.diag.message_detail
    return (f"{primary}: {detail}" if detail else primary)[:1000]
