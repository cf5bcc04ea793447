"""What a flush does when something is wrong: with a row, a group of them, a table, or all of it."""

import math
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.batch.flush import FlushFailed
from helena_cli.batch.operation import Operation
from helena_cli.database import schema
from helena_cli.database.writer import PostgresWriter
from helena_cli.errors import DatabaseUnreachable, HelenaError
from tests.writing import Counting, Desk, always, never

pytestmark = pytest.mark.postgres

T = "CREATE TABLE t (k int PRIMARY KEY, v int NOT NULL CHECK (v >= 0), w text)"


def dead(outcome: Any) -> list[tuple[int, str]]:
    return [(verdict.operation_id, verdict.sqlstate) for verdict in outcome.dead]


def held(outcome: Any) -> list[tuple[int, str]]:
    return [(verdict.operation_id, verdict.sqlstate) for verdict in outcome.held]


@contextmanager
def as_role(desk: Desk) -> Iterator[str]:
    """The desk's flushes run as a role without any right on new tables."""
    role = f"helena_test_{secrets.token_hex(4)}"
    desk.sql(f"CREATE ROLE {role}")

    def connect(purpose: str) -> psycopg.Connection[Any]:
        connection = desk.connect(purpose)
        connection.execute(f"SET ROLE {role}".encode())
        return connection

    own, desk.writer = desk.writer, PostgresWriter(connect, host="test")
    try:
        yield role
    finally:
        desk.writer.close()
        desk.writer = own
        desk.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


# Rows


@pytest.mark.parametrize(
    ("data", "sqlstate"),
    [
        ('{"k": 7, "v": -1}', "23514"),
        ('{"k": 7, "v": null}', "23502"),
        ('{"k": 7, "w": "only"}', "23502"),
        ('{"k": 7, "v": "many"}', "22P02"),
        ('{"k": "seven", "v": 1}', "22P02"),
        ('{"k": 7, "v": 99999999999}', "22003"),
        ('{"k": 1.5, "v": 1}', "22P02"),
    ],
)
def test_a_bad_row_dies_with_its_reason_and_the_good_ones_go_in(
    desk: Desk, data: str, sqlstate: str
):
    desk.sql(T)
    before = desk.add("insert", "t", k=1, v=1)
    bad = desk.add_json("insert", "t", data)
    after = [desk.add("insert", "t", k=n, v=1) for n in range(2, 6)]
    outcome = desk.flush()
    assert dead(outcome) == [(bad, sqlstate)]
    assert sorted(outcome.written) == [before, *after]
    assert outcome.dead[0].message
    assert desk.one("SELECT count(*) FROM t") == 5


@pytest.mark.parametrize("others", [4, 200])
def test_json_that_only_the_database_refuses_kills_its_row_alone(desk: Desk, others: int):
    desk.sql("CREATE TABLE j (k int PRIMARY KEY, j jsonb)")
    bad = desk.add_json("insert", "j", '{"k": 0, "j": {"n": 1e999999}}')
    good = [desk.add("insert", "j", k=n, j={"n": n}) for n in range(1, others + 1)]
    outcome = desk.flush()
    assert dead(outcome) == [(bad, "22003")]
    assert sorted(outcome.written) == good
    assert desk.one("SELECT count(*) FROM j") == others


def test_the_verdict_names_the_constraint_and_the_value(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, u int CONSTRAINT only_one UNIQUE)")
    desk.add("insert", "t", k=1, u=41)
    desk.add("insert", "t", k=2, u=41)
    (verdict,) = desk.flush().dead
    assert verdict.constraint == "only_one"
    assert "41" in verdict.message


def test_of_two_rows_that_exclude_each_other_the_older_one_stays(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, u int UNIQUE)")
    older = desk.add("insert", "t", k=9, u=1)
    younger = desk.add("insert", "t", k=1, u=1)
    outcome = desk.flush()
    assert outcome.written == (older,)
    assert dead(outcome) == [(younger, "23505")]


def test_a_domain_that_wants_a_value_refuses_only_the_row_without_one(desk: Desk):
    desk.sql("CREATE DOMAIN needed AS int NOT NULL; CREATE TABLE t (k int PRIMARY KEY, d needed)")
    desk.add("insert", "t", k=1, d=1)
    desk.add("insert", "t", k=2)
    desk.add("update", "t", k=3, d=None)
    assert sorted(dead(desk.flush())) == [(2, "23502"), (3, "23502")]
    assert desk.sql("SELECT * FROM t") == [(1, 1)]


def test_what_a_trigger_raises_concerns_its_row(desk: Desk):
    desk.sql(
        f"{T}; CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.w = 'bad' THEN RAISE EXCEPTION 'not this one' USING DETAIL = 'really'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER no BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION no()"
    )
    for k in range(9):
        desk.add("insert", "t", k=k, v=1, w="bad" if k == 4 else "good")
    (verdict,) = desk.flush().dead
    assert (verdict.operation_id, verdict.sqlstate) == (5, "P0001")
    assert verdict.message == "not this one: really"


@pytest.mark.parametrize("bad", [1, 4, 16])
def test_bad_rows_cost_a_logarithm_of_statements(desk: Desk, bad: int):
    desk.sql(T)
    rows = 1024
    for number in range(rows):
        desk.add("insert", "t", k=number, v=-1 if number % (rows // bad) == 5 else 1)
    before = Counting.trips
    outcome = desk.flush()
    trips = Counting.trips - before
    assert len(outcome.dead) == bad
    assert len(outcome.written) == rows - bad
    # Two halves on each level of the search, each with its savepoint; and the flush itself.
    assert trips <= 2 * (2 * bad * math.log2(rows) + 1) + 20


def test_a_merged_row_that_fails_is_judged_by_its_originals_in_order(desk: Desk):
    desk.sql(T)
    desk.add("insert", "t", k=1, v=1)
    bad = desk.add("update", "t", k=1, v=-1)
    desk.add("update", "t", k=1, w="last")
    desk.add("insert", "t", k=2, v=2)
    outcome = desk.flush()
    assert dead(outcome) == [(bad, "23514")]
    assert sorted(outcome.written) == [1, 3, 4]
    assert not outcome.coalesced
    assert desk.sql("SELECT * FROM t ORDER BY k") == [(1, 1, "last"), (2, 2, None)]


def test_a_dead_operation_does_not_hold_up_the_later_ones_of_its_key(desk: Desk):
    desk.sql(T)
    desk.add("message", "t", k=1, v=-1)
    desk.add("insert", "t", k=1, v=1)
    desk.add("message", "t", k=1, v=2)
    assert dead(desk.flush()) == [(1, "23514")]
    assert desk.sql("SELECT k, v FROM t") == [(1, 1)]


def test_unreadable_keys_among_those_that_only_the_database_can_read(desk: Desk):
    desk.sql("CREATE TABLE t (k timestamptz PRIMARY KEY, v int)")
    for day in range(1, 29):
        desk.add("insert", "t", k=f"2026-02-{day:02}T00:00:00Z", v=day)
        desk.add("update", "t", k=f"{day} Feb 2026", v=day + 100)
    worse = [desk.add("insert", "t", k=text, v=1) for text in ("tomorrowish", "2026-02-30", "")]
    outcome = desk.flush()
    assert sorted(n for n, _ in dead(outcome)) == worse
    assert (len(outcome.written), len(outcome.coalesced)) == (28, 28)
    assert desk.one("SELECT min(v) FROM t") == 101


def test_an_update_without_a_key_is_dead_and_says_so(desk: Desk):
    desk.sql(T)
    desk.add("update", "t", v=1)
    outcome = desk.flush()
    assert dead(outcome) == [(1, "HL001")]
    assert "(k)" in outcome.dead[0].message
    assert desk.position("t") == (1, [])


def test_a_constraint_that_is_checked_late_is_checked_at_once(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int REFERENCES p DEFERRABLE INITIALLY DEFERRED,"
        " u int UNIQUE DEFERRABLE INITIALLY DEFERRED)"
    )
    good = desk.add("insert", "t", k=1, u=1)
    orphan = desk.add("insert", "t", k=2, p=9, u=2)
    double = desk.add("insert", "t", k=3, u=1)
    outcome = desk.flush()
    assert sorted(dead(outcome)) == [(orphan, "23503"), (double, "23505")]
    assert outcome.written == (good,)


# Foreign keys


def test_a_child_waits_for_a_late_parent_and_then_goes_in(desk: Desk):
    child = desk.add("insert", "es_document_usage_log", es_doc_id="ns:1", accessed_by="me")
    asked: list[tuple[int, str]] = []

    def hold(operation: Operation, parent: str) -> bool:
        asked.append((operation.id, parent))
        return True

    outcome = desk.flush(hold=hold)
    assert asked == [(child, "es_document_references")]
    assert held(outcome) == [(child, "23503")]
    assert outcome.held[0].parent == "es_document_references"
    assert outcome.held[0].constraint == "es_document_usage_log_es_doc_id_fkey"
    assert desk.position("es_document_usage_log") == (child, [child])
    parent = desk.add("insert", "es_document_references", es_index="i", es_doc_id="ns:1")
    assert sorted(desk.flush().written) == [child, parent]
    assert desk.position("es_document_usage_log") == (child, [])


def test_a_child_whose_parent_never_comes_is_dead(desk: Desk):
    desk.add("insert", "es_document_usage_log", es_doc_id="ns:1", accessed_by="me")
    (verdict,) = desk.flush(hold=never).dead
    assert (verdict.sqlstate, verdict.parent) == ("23503", "es_document_references")
    assert "ns:1" in verdict.message


def test_the_parent_is_named_as_its_own_lane_names_it(desk: Desk):
    desk.sql(
        "CREATE SCHEMA s; CREATE TABLE s.p (k int PRIMARY KEY); CREATE TABLE q (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int REFERENCES s.p, q int REFERENCES q)"
    )
    asked: list[str] = []

    def hold(_: Operation, parent: str) -> bool:
        asked.append(parent)
        return False

    desk.add("insert", "t", k=1, p=1)
    desk.flush(hold=hold)
    assert asked == ["s.p"]
    desk.add("insert", "t", k=1, q=1)
    desk.add("insert", "public.q", k=9)
    asked.clear()
    desk.flush(hold=hold)
    # The lane of this batch first, then the other ways to spell it.
    assert asked == ["public.q", "q"]


def test_later_operations_on_a_key_wait_for_the_one_that_was_put_back(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int REFERENCES p, v int)"
    )
    desk.add("insert", "t", k=1, p=1, v=1)
    desk.add("message", "t", k=1, v=2)
    desk.add("update", "t", k="1", v=3)
    desk.add("update", "t", k=2, v=4)
    outcome = desk.flush(hold=always)
    assert held(outcome) == [(1, "23503"), (2, "HL002"), (3, "HL002")]
    assert "operation 1" in outcome.held[1].message
    assert desk.position("t") == (4, [1, 2, 3])
    desk.put_back(1, due=False)
    later = desk.add("update", "t", k=1, v=5)
    outcome = desk.flush(hold=always)
    assert held(outcome) == [(2, "HL002"), (3, "HL002"), (later, "HL002")]
    assert desk.position("t") == (later, [1, 2, 3, later])
    desk.sql("INSERT INTO p VALUES (1)")
    desk.put_back(1)
    assert not desk.flush(hold=always).held
    assert desk.sql("SELECT * FROM t ORDER BY k") == [(1, 1, 5), (2, None, 4)]


def test_when_the_one_that_was_put_back_dies_the_others_go_on(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int REFERENCES p, v int)"
    )
    desk.add("insert", "t", k=1, p=1, v=1)
    desk.add("message", "t", k=1, v=2)
    desk.flush(hold=always)
    outcome = desk.flush(hold=never)
    assert (dead(outcome), outcome.written) == ([(1, "23503")], (2,))
    assert desk.sql("SELECT * FROM t") == [(1, None, 2)]


def test_in_a_merged_row_what_comes_before_the_orphan_goes_in(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int REFERENCES p, v int)"
    )
    desk.add("insert", "t", k=1, v=1)
    desk.add("update", "t", k=1, p=1)
    desk.add("update", "t", k=1, v=3)
    outcome = desk.flush(hold=always)
    assert outcome.written == (1,)
    assert held(outcome) == [(2, "23503"), (3, "HL002")]
    assert desk.sql("SELECT * FROM t") == [(1, None, 1)]


def test_a_row_that_is_referenced_itself_waits_for_nobody(desk: Desk):
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, code int UNIQUE);"
        "CREATE TABLE c (k int PRIMARY KEY, code int REFERENCES t (code));"
        "INSERT INTO t VALUES (1, 1); INSERT INTO c VALUES (1, 1)"
    )
    desk.add("update", "t", k=1, code=2)
    outcome = desk.flush(hold=always)
    assert dead(outcome) == [(1, "23503")]


def test_a_parent_of_a_partition_is_found(desk: Desk):
    desk.sql(
        "CREATE TABLE p (k int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, p int) PARTITION BY RANGE (k);"
        "CREATE TABLE t_1 (k int NOT NULL, p int CONSTRAINT odd_name REFERENCES p);"
        "ALTER TABLE t ATTACH PARTITION t_1 FOR VALUES FROM (0) TO (100)"
    )
    desk.add("insert", "t", k=1, p=1)
    (verdict,) = desk.flush(hold=always).held
    assert verdict.parent == "p"


def test_more_than_a_thousand_held_operations_make_the_lane_wait(desk: Desk):
    desk.sql("CREATE TABLE p (k int PRIMARY KEY); CREATE TABLE t (k int PRIMARY KEY, p int)")
    desk.sql("ALTER TABLE t ADD FOREIGN KEY (p) REFERENCES p; CREATE TABLE other (k int)")
    for number in range(1001):
        desk.add("insert", "t", k=number, p=1)
    good = desk.add("insert", "t", k=5000, p=None)
    desk.add("insert", "other", k=1)
    outcome = desk.flush(hold=always)
    assert "1001" in outcome.waiting["t"].reason and outcome.waiting["t"].remedy
    assert outcome.settled_tables == {"other"}
    assert desk.position("t") == (0, [])
    assert desk.one("SELECT count(*) FROM t") == 0
    del desk.pending[1]
    outcome = desk.flush(hold=always)
    assert len(outcome.held) == 1000 and outcome.written == (good,)
    assert len(desk.position("t")[1]) == 1000


# Groups


def test_an_unknown_column_kills_the_operations_that_give_it(desk: Desk):
    desk.sql(T)
    desk.add("insert", "t", k=1, v=1)
    desk.add("update", "t", k=1, zebra=1)
    desk.add("update", "t", k=1, w="x")
    outcome = desk.flush()
    assert dead(outcome) == [(2, "42703")]
    assert "zebra" in outcome.dead[0].message
    assert desk.sql("SELECT * FROM t") == [(1, 1, "x")]


def test_a_generated_column_kills_its_group_at_once(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v + 1) STORED)")
    good = [desk.add("insert", "t", k=k, v=k) for k in range(100)]
    bad = [desk.add("insert", "t", k=k, v=k, g=k) for k in range(100, 200)]
    before = Counting.trips
    outcome = desk.flush()
    assert Counting.trips - before < 20
    assert dead(outcome) == [(number, "428C9") for number in bad]
    assert list(outcome.written) == good


def test_a_group_that_dies_takes_no_good_original_with_it(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v + 1) STORED)")
    for k in range(50):
        desk.add("insert", "t", k=k, v=k)
        desk.add("update", "t", k=k, g=1)
    before = Counting.trips
    outcome = desk.flush()
    assert Counting.trips - before < 25
    assert len(outcome.written) == 50
    assert {sqlstate for _, sqlstate in dead(outcome)} == {"428C9"}
    assert desk.one("SELECT count(*) FROM t") == 50


def test_a_view_that_takes_no_rows_kills_its_group(desk: Desk):
    desk.sql("CREATE VIEW w AS SELECT count(*) AS v FROM messages")
    desk.add("insert", "w", v=1)
    assert dead(desk.flush()) == [(1, "55000")]


# Lanes


def test_a_table_that_does_not_exist_makes_its_lane_wait_and_no_other(desk: Desk):
    desk.sql(T)
    desk.add("insert", "nowhere", k=1)
    desk.add("insert", "no_schema.t", k=1)
    good = desk.add("insert", "t", k=1, v=1)
    outcome = desk.flush()
    assert outcome.written == (good,)
    assert {lane: w.sqlstate for lane, w in outcome.waiting.items()} == {
        "nowhere": "42P01",
        "no_schema.t": "42P01",
    }
    assert all(waiting.remedy for waiting in outcome.waiting.values())
    desk.sql("CREATE TABLE nowhere (k int)")
    assert len(desk.flush(probe=True).written) == 1


@pytest.mark.parametrize(
    "relation", ["es_document_references_pkey", "es_document_references_id_seq"]
)
def test_what_is_not_a_table_makes_its_lane_wait(desk: Desk, relation: str):
    desk.add("insert", relation, k=1)
    assert desk.flush().waiting[relation].sqlstate == "42P01"


def test_a_missing_right_makes_the_lane_wait_with_few_statements(desk: Desk):
    desk.sql(f"{T}; CREATE TABLE u (k int PRIMARY KEY)")
    with as_role(desk) as role:
        desk.sql(f"GRANT ALL ON u TO {role}; GRANT SELECT ON t TO {role}")
        for k in range(1000):
            desk.add("insert", "t", k=k, v=1)
        good = desk.add("insert", "u", k=1)
        before = Counting.trips
        outcome = desk.flush()
        assert Counting.trips - before < 100
        assert outcome.waiting["t"].sqlstate == "42501"
        assert "GRANT" in outcome.waiting["t"].remedy
        assert outcome.written == (good,)
        desk.sql(f"GRANT INSERT, UPDATE ON t TO {role}")
        assert len(desk.flush(probe=True).written) == 1000


def test_a_schema_that_may_not_be_used_makes_its_lane_wait(desk: Desk):
    desk.sql("CREATE SCHEMA s; CREATE TABLE s.t (k int PRIMARY KEY); CREATE TABLE u (k int)")
    with as_role(desk) as role:
        desk.sql(f"GRANT ALL ON u, s.t TO {role}")
        desk.add("insert", "s.t", k=1)
        desk.add("insert", "u", k=1)
        outcome = desk.flush()
        assert outcome.waiting["s.t"].sqlstate == "42501"
        assert outcome.written == (2,)


def policy(desk: Desk, role: str) -> None:
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, owner text, v int CHECK (v >= 0));"
        "ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
        f"GRANT ALL ON t TO {role};"
        f"CREATE POLICY mine ON t TO {role} USING (owner = 'me') WITH CHECK (owner = 'me')"
    )


@pytest.mark.parametrize("rows", [4, 20, 64])
def test_rows_that_a_policy_forbids_die_alone_when_half_of_the_group_is_allowed(
    desk: Desk, rows: int
):
    with as_role(desk) as role:
        policy(desk, role)
        for k in range(rows):
            desk.add("insert", "t", k=k, owner="me" if k % 2 else "you", v=1)
        outcome = desk.flush()
        assert len(outcome.written) == rows // 2
        assert {sqlstate for _, sqlstate in dead(outcome)} == {"42501"}
        assert len(outcome.dead) == rows // 2


def test_a_few_forbidden_rows_among_many_die_alone(desk: Desk):
    with as_role(desk) as role:
        policy(desk, role)
        for k in range(500):
            desk.add("insert", "t", k=k, owner="you" if k in (3, 400) else "me", v=1)
        desk.add("insert", "t", k=1000, owner="me", v=-1)
        outcome = desk.flush()
        assert dead(outcome) == [(4, "42501"), (401, "42501"), (501, "23514")]
        assert len(outcome.written) == 498


def test_a_policy_that_forbids_most_of_the_rows_makes_the_lane_wait(desk: Desk):
    with as_role(desk) as role:
        policy(desk, role)
        for k in range(9):
            desk.add("insert", "t", k=k, owner="me" if k < 4 else "you", v=1)
        outcome = desk.flush()
        assert outcome.waiting["t"].sqlstate == "42501"
        assert desk.one("SELECT count(*) FROM t") == 0


def test_an_exhausted_sequence_makes_the_lane_wait(desk: Desk):
    desk.sql(
        "CREATE SEQUENCE tiny MAXVALUE 2;"
        "CREATE TABLE t (n int DEFAULT nextval('tiny'), k int PRIMARY KEY)"
    )
    for k in range(3):
        desk.add("insert", "t", k=k)
    outcome = desk.flush()
    assert outcome.waiting["t"].sqlstate == "2200H"
    assert desk.one("SELECT count(*) FROM t") == 0


def test_a_locked_table_makes_its_lane_wait_and_nothing_hangs(desk: Desk):
    desk.sql(f"{T}; CREATE TABLE u (k int PRIMARY KEY)")
    with psycopg.connect(desk.dsn) as other:
        other.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        desk.add("insert", "t", k=1, v=1)
        desk.add("insert", "u", k=1)
        # The catalog is read for the first time: that must not wait for the lock either.
        outcome = desk.flush(probe=True)
        assert outcome.waiting["t"].sqlstate == "55P03"
        assert outcome.written == (2,)
    assert desk.flush(probe=True).written == (1,)


def test_both_names_of_a_table_wait_together(desk: Desk):
    desk.sql(T)
    with psycopg.connect(desk.dsn) as other:
        other.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        desk.add("insert", "t", k=1, v=1)
        desk.add("insert", "public.t", k=1, v=2)
        assert set(desk.flush(probe=True).waiting) == {"t", "public.t"}


def test_a_row_that_somebody_keeps_locked_makes_the_lane_wait(desk: Desk):
    desk.sql(f"{T}; INSERT INTO t VALUES (1, 1)")
    with psycopg.connect(desk.dsn) as other:
        other.execute("UPDATE t SET v = 2")
        desk.add("update", "t", k=1, v=3)
        assert desk.flush(probe=True).waiting["t"].sqlstate == "55P03"


def test_nothing_of_a_lane_that_fails_in_the_middle_stays(desk: Desk):
    desk.sql(f"{T}; CREATE TABLE c (k int PRIMARY KEY)")
    desk.sql(
        "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.w = 'late' THEN PERFORM * FROM absent; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER late BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION late()"
    )
    desk.add("insert", "t", k=1, v=1)
    desk.add("insert", "t", k=2, v=-1)
    desk.add("insert", "t", k=3, v=1, w="late")
    outcome = desk.flush()
    assert outcome.waiting["t"].sqlstate == "42P01"
    assert not outcome.dead and not outcome.written
    assert desk.one("SELECT count(*) FROM t") == 0
    assert desk.position("t") == (0, [])


# The whole flush


def failing(desk: Desk, **options: Any) -> FlushFailed:
    queued = dict(desk.pending)
    with pytest.raises(FlushFailed) as caught:
        desk.flush(**options)
    assert desk.pending == queued
    assert caught.value.remedy
    return caught.value


def test_a_statement_that_takes_too_long_asks_for_a_smaller_batch(desk: Desk):
    desk.sql(
        f"{T}; CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$;"
        "CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    desk.writer.STATEMENT_TIMEOUT = 200
    desk.add("insert", "t", k=1, v=1)
    failed = failing(desk)
    assert (failed.sqlstate, failed.halve, failed.unknown) == ("57014", True, False)
    desk.sql("DROP TRIGGER slow ON t")
    assert desk.flush().written == (1,)


def raising(desk: Desk, sqlstate: str) -> None:
    desk.sql(
        f"{T}; CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF NEW.w = 'odd' THEN RAISE EXCEPTION 'odd' USING ERRCODE = '{sqlstate}'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER odd BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION odd()"
    )


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "53100", "08006", "25006", "57P03"])
def test_what_may_pass_fails_the_whole_flush_and_nothing_leaves_the_spool(
    desk: Desk, sqlstate: str
):
    raising(desk, sqlstate)
    desk.add("insert", "t", k=1, v=1)
    desk.add("insert", "t", k=2, v=1, w="odd")
    failed = failing(desk)
    assert (failed.sqlstate, failed.halve, failed.unknown) == (sqlstate, False, False)
    assert isinstance(failed.__cause__, HelenaError)
    assert desk.one("SELECT count(*) FROM t") == 0
    assert desk.sealed == []


def test_an_unknown_error_is_tried_again_and_at_last_blamed_on_the_row(desk: Desk):
    raising(desk, "0A000")
    desk.add("insert", "t", k=1, v=1)
    desk.add("insert", "t", k=2, v=1, w="odd")
    failed = failing(desk)
    assert (failed.sqlstate, failed.unknown) == ("0A000", True)
    outcome = desk.flush(blame_rows=True)
    assert (outcome.written, dead(outcome)) == ((1,), [(2, "0A000")])


def test_a_database_without_the_schema_asks_for_init(dsn: str):
    desk = Desk(dsn)
    desk.add("insert", "t", k=1)
    failed = failing(desk)
    assert failed.sqlstate == "42P01" and "helena init" in failed.remedy
    desk.sql("CREATE SCHEMA helena; CREATE TABLE helena.meta (id uuid)")
    assert "helena init" in failing(desk).remedy
    desk.sql("INSERT INTO helena.meta VALUES (gen_random_uuid())")
    assert "helena init" in failing(desk).remedy
    desk.close()


def test_a_role_without_rights_on_the_schema_is_told_which_it_needs(desk: Desk):
    with as_role(desk):
        desk.sql("REVOKE ALL ON SCHEMA helena FROM PUBLIC")
        desk.add("insert", "t", k=1)
        assert "GRANT USAGE ON SCHEMA helena" in failing(desk).remedy
        desk.sql("GRANT USAGE ON SCHEMA helena TO PUBLIC; REVOKE ALL ON helena.meta FROM PUBLIC")
        assert "helena.meta" in failing(desk).remedy


def test_a_spool_of_another_database_is_refused(desk: Desk):
    desk.target_id = "0a4e1cbe-0000-0000-0000-000000000000"
    desk.add("insert", "t", k=1)
    failed = failing(desk)
    assert "belongs to another database" in str(failed)


def test_the_name_of_a_table_cannot_stop_the_others(desk: Desk):
    desk.sql(T)
    monster = "".join(secrets.token_hex(1000) for _ in range(9))
    desk.add("insert", monster, k=1)
    good = desk.add("insert", "t", k=1, v=1)
    outcome = desk.flush()
    assert outcome.written == (good,)
    assert {name: w.sqlstate for name, w in outcome.waiting.items()} == {monster: "54000"}


def test_a_name_or_value_that_the_database_has_no_letters_for_stops_nothing(postgres: str):
    name = f"helena_{secrets.token_hex(6)}"
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING latin1 LOCALE 'C'".encode()
        )
    desk = Desk(make_conninfo(postgres, dbname=name, client_encoding="utf8"))
    schema.initialise(desk.admin)
    desk.sql("CREATE TABLE t (k text PRIMARY KEY, v text)")
    desk.add("insert", "表", k=1)
    good = desk.add("insert", "t", k="ä", v="é")
    bad = [desk.add("insert", "t", k="b", v="表"), desk.add("insert", "t", k="表", v="b")]
    outcome = desk.flush()
    assert outcome.written == (good,)
    assert dead(outcome) == [(number, "22P05") for number in bad]
    assert outcome.waiting["表"].sqlstate == "22P05"
    desk.close()
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name}".encode())


def test_a_locked_position_row_fails_the_whole_flush(desk: Desk):
    desk.sql(T)
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    with psycopg.connect(desk.dsn) as other:
        other.execute("SELECT * FROM helena.spool_position FOR UPDATE")
        desk.add("insert", "t", k=2, v=1)
        failed = failing(desk, probe=True)
        assert (failed.sqlstate, failed.unknown) == ("55P03", False)
    assert desk.flush().written == (2,)


def test_a_database_that_cannot_be_reached_fails_the_flush_with_its_remedy(desk: Desk):
    def refuse(purpose: str) -> psycopg.Connection[Any]:
        raise DatabaseUnreachable("nobody there", remedy="start it")

    desk.writer = PostgresWriter(refuse, host="test")
    desk.add("insert", "t", k=1)
    failed = failing(desk)
    assert failed.remedy == "start it"
    assert isinstance(failed.__cause__, DatabaseUnreachable)
    desk.writer.maintain(frozenset({"t"}))
    desk.writer.close()


def test_a_lost_connection_is_replaced_at_the_next_flush(desk: Desk):
    desk.sql(T)
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'helena flush' AND datname = current_database()"
    )
    desk.add("insert", "t", k=2, v=1)
    failing(desk)
    assert desk.flush().written == (2,)
    assert desk.connected == ["flush", "flush"]


def test_a_deadlock_is_left_to_the_next_flush(desk: Desk):
    desk.sql(f"{T}; INSERT INTO t VALUES (1, 1), (2, 1)")
    desk.sql(
        "CREATE FUNCTION lock_too() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;"
        "CREATE TRIGGER lock_too BEFORE UPDATE ON t FOR EACH ROW WHEN (NEW.w = 'x')"
        " EXECUTE FUNCTION lock_too()"
    )
    with psycopg.connect(desk.dsn) as other:
        other.execute("SET deadlock_timeout = '10min'")
        other.execute("SELECT pg_advisory_xact_lock(1)")
        desk.add("update", "t", k=1, v=5)
        desk.add("message", "t", k=1, v=5)
        desk.add("update", "t", k=1, v=6, w="x")
        failures: list[FlushFailed] = []

        def flush() -> None:
            try:
                desk.flush()
            except FlushFailed as failed:
                failures.append(failed)

        thread = threading.Thread(target=flush)
        thread.start()
        while not desk.one(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ):
            pass
        other.execute("UPDATE t SET v = 9 WHERE k = 1")
        thread.join()
    assert [failed.sqlstate for failed in failures] == ["40P01"]
    assert desk.flush().written


# A table that changes under the writer's feet


def test_a_new_column_is_seen_before_anybody_is_judged(desk: Desk):
    desk.sql(T)
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.sql("ALTER TABLE t ADD fresh int")
    desk.add("update", "t", k=1, fresh=7)
    assert desk.flush().written == (2,)
    assert desk.one("SELECT fresh FROM t") == 7
    assert len(desk.sealed) == 2


def test_a_column_that_changed_its_type_is_seen_before_anybody_is_judged(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int)")
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.sql("ALTER TABLE t ALTER v TYPE text")
    desk.add("update", "t", k=1, v="text")
    assert desk.flush().written == (2,)


def test_a_key_that_came_or_went_is_seen_before_anybody_is_judged(desk: Desk):
    desk.sql("CREATE TABLE t (k int, v int)")
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.sql("ALTER TABLE t ADD UNIQUE (k)")
    desk.add("insert", "t", k=1, v=2)
    desk.add("update", "t", k=1, v=3)
    assert not desk.flush().dead
    assert desk.sql("SELECT * FROM t") == [(1, 3)]
    desk.sql("ALTER TABLE t DROP CONSTRAINT t_k_key")
    desk.add("insert", "t", k=1, v=4)
    assert not desk.flush().dead
    assert desk.one("SELECT count(*) FROM t") == 2


def test_several_tables_that_changed_cost_one_more_attempt(desk: Desk):
    tables = ("a", "b", "c")
    for table in tables:
        desk.sql(f"CREATE TABLE {table} (k int PRIMARY KEY)")
        desk.add("insert", table, k=1)
    desk.flush()
    for table in tables:
        desk.sql(f"ALTER TABLE {table} ADD fresh int")
        desk.add("insert", table, k=1, fresh=1)
    assert len(desk.flush().written) == 3


def test_a_table_that_was_made_anew_is_seen_before_anybody_is_judged(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int)")
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.sql("DROP TABLE t")
    desk.add("insert", "t", k=1, v=1)
    assert desk.flush().waiting["t"].sqlstate == "42P01"
    desk.sql("CREATE TABLE t (k text PRIMARY KEY, v text)")
    desk.add("insert", "t", k="a", v="b")
    assert len(desk.flush(probe=True).written) == 2
