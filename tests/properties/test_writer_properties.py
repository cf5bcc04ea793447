"""Batches do to a table what the same operations do one by one. Real PostgreSQL."""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.types.json import Json

from helena_cli.database import bulk_load
from tests.writing import Desk, always

pytestmark = pytest.mark.postgres

# `bad` can never be set and nothing unsets it, so a merged row fails as its originals do.
TABLES = """
CREATE TABLE parent (k int PRIMARY KEY);
CREATE TABLE t (
    k int PRIMARY KEY DEFAULT nextval('own'),
    slug text UNIQUE,
    at timestamptz,
    v int,
    w text DEFAULT 'default',
    p int REFERENCES parent,
    bad int CHECK (bad IS NULL)
);
CREATE TABLE moments (at timestamptz PRIMARY KEY, v int, w text, bad int CHECK (bad IS NULL));
"""

spelled = {n: [n, str(n), f" {n}", f"0{n}"] for n in (1, 2, 3)}
instants = {
    1: ["2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01", "1 Jan 2026"],
    2: ["2026-01-02T00:00:00Z", "20260102"],
    3: ["never"],
}


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    number = draw(st.sampled_from([1, 2, 3]))
    choices: dict[str, st.SearchStrategy[Any]] = {
        "k": st.sampled_from([*spelled[number], "none", None]),
        "slug": st.just(f"s{number}"),
        "v": st.integers(0, 9) | st.none(),
        "w": st.sampled_from(["x", "y", None]),
        "p": st.sampled_from([1, 2]),
    }
    if draw(st.integers(0, 9)) == 0:
        choices["bad"] = st.just(1)
    data = draw(st.fixed_dictionaries({}, optional=choices))
    return data or {"v": 0}


@st.composite
def moments(draw: st.DrawFn) -> dict[str, Any]:
    at = draw(st.sampled_from(instants[draw(st.sampled_from([1, 1, 2, 2, 3]))]))
    optional = {"v": st.integers(0, 9), "w": st.sampled_from("xy")}
    if draw(st.integers(0, 9)) == 0:
        optional["bad"] = st.just(1)
    return {"at": at, **draw(st.fixed_dictionaries({}, optional=optional))}


kinds = st.sampled_from(["insert", "update", "message"])
operations = st.one_of(
    st.tuples(kinds, st.sampled_from(["t", "public.t"]), rows()),
    st.tuples(kinds, st.just("moments"), moments()),
)
# Long enough that operations meet on a key, in one batch and under both names of the table.
streams = st.lists(operations, min_size=8, max_size=40)
cuts = st.lists(st.integers(1, 40), max_size=2)


@pytest.fixture(params=["loaded", "by statement"])
def worthwhile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches this small would all go by the statement."""
    if request.param == "loaded":
        monkeypatch.setattr(bulk_load, "WORTHWHILE", 1)
        monkeypatch.setattr(bulk_load, "PAUSE", 0)


@pytest.fixture
def desk(helena_dsn: str) -> Iterator[Desk]:
    desk = Desk(helena_dsn)
    desk.sql(f"CREATE SEQUENCE own START 1000; {TABLES}; CREATE SCHEMA one_by_one")
    desk.sql(f"SET search_path = one_by_one, public; {TABLES}; INSERT INTO parent VALUES (1), (2)")
    desk.sql("SET search_path = public")
    yield desk
    desk.close()


def apply_one(connection: psycopg.Connection[Any], kind: str, table: str, data: Any) -> bool:
    """What an operation means, spelled out; False when it cannot be applied."""
    keys = [key for key in (["at"] if table == "moments" else ["k", "slug"]) if data.get(key)]
    if kind == "update" and not keys:
        return False
    target = sql.Identifier("one_by_one", table)
    names = sql.SQL(", ").join(map(sql.Identifier, data))
    record = sql.SQL("json_populate_record(NULL::{}, {})").format(target, Json(data))
    key = sql.Identifier(keys[0]) if keys else sql.SQL("v")
    match = sql.SQL("t.{0} = r.{0}").format(key) if keys else sql.SQL("false")
    changes = [sql.SQL("{0} = r.{0}").format(sql.Identifier(n)) for n in data if n not in keys[:1]]
    try:
        with connection.transaction():
            if kind != "message" and changes:
                connection.execute(
                    sql.SQL("UPDATE {} AS t SET {} FROM {} AS r WHERE {}").format(
                        target, sql.SQL(", ").join(changes), record, match
                    )
                )
            connection.execute(
                sql.SQL(
                    "INSERT INTO {0} ({1}) SELECT {1} FROM {2} AS r"
                    " WHERE NOT EXISTS (SELECT FROM {0} AS t WHERE {3})"
                ).format(target, names, record, match)
            )
    except psycopg.Error:
        return False
    return True


def contents(desk: Desk, schema: str) -> list[Any]:
    """The rows; a key from the sequence is only known to be one."""
    return [
        desk.sql(
            f"SELECT CASE WHEN k < 1000 THEN k END AS k, slug, v, w, p FROM {schema}.t"
            " ORDER BY 1, 2, 3, 4, 5"
        ),
        desk.sql(f"SELECT * FROM {schema}.moments ORDER BY at"),
    ]


@pytest.mark.usefixtures("worthwhile")
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(stream=streams, splits=cuts, late=st.booleans())
def test_batches_do_what_the_operations_do_one_by_one(
    desk: Desk, stream: list[tuple[Any, str, dict[str, Any]]], splits: list[int], late: bool
):
    desk.sql(
        "TRUNCATE t, moments, parent, one_by_one.t, one_by_one.moments;"
        "DELETE FROM helena.spool_position; SET TimeZone = 'UTC'"
    )
    desk.pending.clear()
    desk.nonces.clear()
    if not late:
        desk.sql("INSERT INTO parent VALUES (1), (2)")
    refused, dead = [], []
    bounds = sorted({0, len(stream), *(cut for cut in splits if cut < len(stream))})
    for start, end in pairwise(bounds):
        for kind, table, data in stream[start:end]:
            number = desk.add_json(kind, table, json.dumps(data))
            if not apply_one(desk.admin, kind, table.removeprefix("public."), data):
                refused.append(number)
        dead += [verdict.operation_id for verdict in desk.flush(hold=always).dead]
    if late:
        desk.sql("INSERT INTO parent VALUES (1), (2)")
        dead += [verdict.operation_id for verdict in desk.flush(hold=always).dead]
    assert not desk.pending
    assert contents(desk, "public") == contents(desk, "one_by_one")
    assert sorted(dead) == refused
