"""What an operation writes down is what PostgreSQL reads."""

from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

from helena_cli.batch.operation import encode

pytestmark = pytest.mark.postgres

VALUES: list[tuple[str, Any, Any]] = [
    ("text", "ü € 🚀 \\u0000 \x01 \"quoted\" 'single'", None),
    ("bigint", 2**63 - 1, None),
    ("numeric", 10**100, Decimal(10**100)),
    ("numeric", Decimal("1.10"), None),
    ("numeric", Decimal("1E-20"), None),
    ("double precision", 5e-324, None),
    ("double precision", -0.0, None),
    ("boolean", True, None),
    ("uuid", UUID("12345678-1234-5678-1234-567812345678"), None),
    ("bytea", bytes(range(256)), None),
    ("date", date(1, 1, 1), None),
    ("date", date(9999, 12, 31), None),
    ("time", time(23, 59, 59, 999999), None),
    ("timestamp", datetime(2026, 1, 2, 3, 4, 5, 6), None),
    ("timestamp", datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 2)),
    (
        "timestamptz",
        datetime(2026, 1, 2, 3, tzinfo=timezone(timedelta(hours=-5))),
        datetime(2026, 1, 2, 8, tzinfo=UTC),
    ),
    ("interval", timedelta(days=1, seconds=2, microseconds=3), None),
    ("interval", timedelta(microseconds=-1), None),
    ("interval", -timedelta(days=400, hours=3), None),
    (
        "jsonb",
        {"a": [1, Decimal("1.50"), None], "b": {1: "x"}},
        {"a": [1, 1.5, None], "b": {"1": "x"}},
    ),
    ("jsonb", [datetime(2026, 1, 1, tzinfo=UTC)], ["2026-01-01T00:00:00Z"]),
    ("text[]", ["a", "b c", '"'], None),
    ("text[]", ("a",), ["a"]),
    ("text[]", {"a"}, ["a"]),
    ("text", None, None),
]


@pytest.mark.parametrize(("sql_type", "value", "expected"), VALUES)
def test_value_arrives_as_it_was_given(dsn, sql_type, value, expected):
    data = encode("insert", "t", {"c": value}, max_bytes=1_000_000)
    with psycopg.connect(dsn, options="-c TimeZone=UTC") as connection:
        query = f"SELECT c FROM json_to_recordset(%s) AS r(c {sql_type})"
        found = connection.execute(query, [f"[{data.decode()}]"]).fetchone()
    assert found == (value if expected is None else expected,)
    if isinstance(value, Decimal):
        assert str(found[0]) == str(Decimal(f"{value:f}"))
