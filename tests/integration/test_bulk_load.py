"""New rows in bulk: the same rows, dead letters and waiting lanes as without. Real PostgreSQL."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psycopg
import pytest

from helena_cli.batch.flush import FlushFailed, Outcome
from helena_cli.batch.reading import Step
from helena_cli.database import bulk_load
from helena_cli.database.transaction import Transaction
from helena_cli.database.writer import PostgresWriter
from tests.hosts import wait_until
from tests.integration.test_writer_failures import as_role, dead, held
from tests.writing import Desk, always

pytestmark = pytest.mark.postgres

ROWS = 200
T = "CREATE TABLE t (k int PRIMARY KEY, v int CHECK (v >= 0), w text DEFAULT 'default')"


class Copies(list[int]):
    """How many rows each COPY wrote; -1 for one that failed. Does `before` one of them, once."""

    before: Callable[[], object] | None = None


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """What the flushes of a test copy."""
    copies = Copies()
    copy = Transaction.copy

    def counting(transaction: Transaction, query: bytes, blocks: Iterable[bytes]) -> int:
        before, copies.before = copies.before, None
        if before is not None:
            before()
        copies.append(-1)
        copies[-1] = copy(transaction, query, blocks)
        return copies[-1]

    monkeypatch.setattr(Transaction, "copy", counting)
    return copies


def add_many(desk: Desk, count: int = ROWS, start: int = 0, **more: Any) -> list[int]:
    """Queue rows with the keys from `start` on."""
    return [desk.add("insert", "t", k=k, **{"v": 1, **more}) for k in range(start, start + count)]


def count(desk: Desk) -> int:
    number: int = desk.one("SELECT count(*) FROM t")
    return number


# When it is used


def test_new_rows_arrive_as_they_were_given(desk: Desk, copies: Copies):
    desk.sql("CREATE TABLE t (j jsonb, k int PRIMARY KEY, a text[], w text DEFAULT 'd', x text)")
    for k in range(ROWS):
        desk.add("insert", "t", x=f"\\N\t{k}\n", k=str(k), a=["a,b", None], j={"k": ["\\", k]})
    outcome = desk.flush()
    assert len(outcome.written) == outcome.rows == ROWS
    assert copies == [ROWS]
    assert desk.sql("SELECT * FROM t ORDER BY k") == [
        ({"k": ["\\", k]}, k, ["a,b", None], "d", f"\\N\t{k}\n") for k in range(ROWS)
    ]


def test_rows_that_exist_are_updated_and_not_loaded(desk: Desk, copies: Copies):
    desk.sql(f"{T}; INSERT INTO t (k, w) SELECT n, 'kept' FROM generate_series(1, {ROWS}) n")
    add_many(desk, start=1, v=2)
    outcome = desk.flush()
    assert (len(outcome.written), copies) == (ROWS, [])
    assert desk.sql("SELECT DISTINCT v, w FROM t") == [(2, "kept")]


def test_a_group_with_one_row_that_exists_is_written_by_the_statement(desk: Desk, copies: Copies):
    desk.sql(f"{T}; INSERT INTO t VALUES (150, 0, 'kept')")
    add_many(desk)
    desk.flush()
    assert copies == []
    assert count(desk) == ROWS
    assert desk.sql("SELECT * FROM t WHERE k = 150") == [(150, 1, "kept")]


def test_few_rows_are_written_by_the_statement(desk: Desk, copies: Copies):
    desk.sql(T)
    add_many(desk, bulk_load.WORTHWHILE - 1)
    desk.flush()
    assert copies == []


def test_after_rows_that_exist_it_is_tried_again_some_groups_later(desk: Desk, copies: Copies):
    desk.sql(f"{T}; INSERT INTO t VALUES (0)")
    add_many(desk)
    desk.flush()
    for turn in range(1, bulk_load.PAUSE + 2):
        add_many(desk, start=turn * ROWS)
        desk.flush()
        assert copies == ([ROWS] if turn > bulk_load.PAUSE else [])
    assert count(desk) == ROWS * (bulk_load.PAUSE + 2)


def test_lines_that_were_read_ahead_are_loaded(desk: Desk, copies: Copies):
    desk.sql(T)
    add_many(desk)
    desk.flush()
    for _ in range(2):
        add_many(desk, start=count(desk), v=2)
        reading = desk.writer.read_ahead(list(desk.pending.values()))
        steps = [step for one in reading.values() for step in one.steps.values()]
        assert all(isinstance(step, Step) and step.line for step in steps)
        desk.flush(ahead=reading)
    assert copies == [ROWS] * 3
    assert desk.one("SELECT count(*) FROM t WHERE v = 2") == 2 * ROWS


def test_what_was_put_back_since_it_was_read_ahead_is_read_as_it_is_now(desk: Desk):
    desk.sql(T)
    add_many(desk, 1)
    desk.flush()
    again = desk.add("insert", "t", k=0, v=2)
    reading = desk.writer.read_ahead(list(desk.pending.values()))
    desk.put_back(again, due=False)
    assert desk.flush(ahead=reading).written == ()
    assert desk.one("SELECT v FROM t WHERE k = 0") != 2


@pytest.mark.parametrize("spelling", ["1010", " 1010", "0x3F2"])
def test_a_row_in_a_table_that_inherits_is_updated_however_a_key_is_spelled(
    desk: Desk, spelling: str
):
    desk.sql(f"{T}; CREATE TABLE heir () INHERITS (t); INSERT INTO heir VALUES (1150, 0, 'theirs')")
    add_many(desk, 10, 1000)
    desk.add("insert", "t", k=spelling, v=1)
    add_many(desk, ROWS - 11, 1011)
    desk.flush()
    assert desk.sql("SELECT tableoid::regclass::text, v, w FROM t WHERE k = 1150") == [
        ("heir", 1, "theirs")
    ]


def test_messages_of_which_some_exist_leave_those_alone(desk: Desk, copies: Copies):
    desk.sql(f"{T}; INSERT INTO t VALUES (7, 0, 'old')")
    for start in (0, ROWS):
        for k in range(start, start + ROWS):
            desk.add("message", "t", k=k, w="new")
        desk.flush()
    assert count(desk) == 2 * ROWS
    assert desk.sql("SELECT k, v, w FROM t WHERE w <> 'new'") == [(7, 0, "old")]


def test_new_messages_are_loaded_and_come_once(desk: Desk, copies: Copies):
    desk.sql(T)
    for v in (1, 2):
        for k in range(ROWS):
            desk.add("message", "t", k=k, v=v)
    assert len(desk.flush().written) == 2 * ROWS
    assert copies == [ROWS]
    assert desk.sql("SELECT DISTINCT v FROM t") == [(1,)]


def test_rows_without_a_key_are_loaded_in_their_order(desk: Desk, copies: Copies):
    desk.sql("CREATE TABLE t (n bigserial, v int)")
    for turn in range(2):
        for v in range(ROWS):
            desk.add("insert", "t", v=v + turn * ROWS)
        desk.flush()
    assert copies == [ROWS, ROWS]
    assert desk.sql("SELECT v FROM t ORDER BY n") == [(v,) for v in range(2 * ROWS)]


def test_operations_that_merged_are_one_row_and_the_last_value_wins(desk: Desk, copies: Copies):
    desk.sql(T)
    for v in (1, 2):
        add_many(desk, v=v)
    add_many(desk, w="last")
    outcome = desk.flush()
    assert (outcome.rows, len(outcome.coalesced), copies) == (ROWS, 2 * ROWS, [ROWS])
    assert desk.sql("SELECT DISTINCT v, w FROM t") == [(1, "last")]


def test_operations_that_merged_are_not_taken_for_their_first_one(desk: Desk, copies: Copies):
    desk.sql(T)
    add_many(desk)
    desk.flush()
    # From now on the line of each operation is made when it is read.
    for v in (1, 2):
        add_many(desk, start=ROWS, v=v)
    desk.flush()
    assert copies == [ROWS, ROWS]
    assert desk.sql(f"SELECT DISTINCT v FROM t WHERE k >= {ROWS}") == [(2,)]


def test_groups_of_different_columns_are_loaded_each_for_itself(desk: Desk, copies: Copies):
    desk.sql(T)
    for k in range(ROWS):
        desk.add_json("insert", "t", ['{"k": %d, "v": 1}', '{"w": "x", "k": %d}'][k % 2] % k)
    for k in range(ROWS, 2 * ROWS):
        desk.add_json("insert", "t", ['{"k": %d, "w": "y"}', '{"w": "y", "k": %d}'][k % 2] % k)
    desk.flush()
    assert sorted(copies) == [ROWS // 2, ROWS + ROWS // 2]
    assert desk.sql("SELECT v, w, count(*) FROM t GROUP BY v, w ORDER BY v, w") == [
        (1, "default", ROWS // 2),
        (None, "x", ROWS // 2),
        (None, "y", ROWS),
    ]


@pytest.mark.parametrize("space", ["\n", "\t", "\r", "\n\t"])
def test_space_between_values_is_no_delimiter(desk: Desk, copies: Copies, space: str):
    desk.sql("CREATE TABLE t (x text)")
    for _ in range(ROWS):
        desk.add_json("insert", "t", f'{{"x":[1,{space}2]}}')
    assert desk.flush().rows == ROWS
    assert copies == [2 * ROWS if space == "\n" else -1]
    assert desk.sql("SELECT x, count(*) FROM t GROUP BY x") == [(f"[1,{space}2]", ROWS)]


def test_names_that_need_quotes_are_quoted(desk: Desk, copies: Copies):
    names = ['a"b', "c d", "COPY", "%s", "$1", "é", "{}", "\\", "'"]
    columns = ", ".join('"' + name.replace('"', '""') + '" text' for name in names)
    desk.sql(f'CREATE TABLE "T ""t""" (k int, "k;2" int, {columns}, PRIMARY KEY ("k;2", k))')
    for k in range(ROWS):
        desk.add("insert", 'T "t"', **{"k;2": k, "k": k % 2, **{name: name for name in names}})
    assert len(desk.flush().written) == ROWS
    assert copies == [ROWS]
    rows = desk.sql('SELECT * FROM "T ""t""" ORDER BY "k;2"')
    assert rows == [(k % 2, k, *names) for k in range(ROWS)]


# Rows that cannot be written


def test_one_bad_row_among_many_new_ones_dies_alone(desk: Desk):
    desk.sql(T)
    numbers = add_many(desk, v=3)
    bad = desk.add("insert", "t", k=1000, v=-1)
    too_long = desk.add("insert", "t", k=10**30, v=1)
    no_number = desk.add("insert", "t", k="seven", v=1)
    outcome = desk.flush()
    assert dead(outcome) == [(bad, "23514"), (too_long, "22003"), (no_number, "22P02")]
    assert sorted(outcome.written) == numbers
    assert count(desk) == ROWS


def test_one_bad_key_of_several_columns_dies_alone(desk: Desk):
    desk.sql("CREATE TABLE t (a int, b varchar(3), PRIMARY KEY (a, b))")
    numbers = [desk.add("insert", "t", a=a, b="b") for a in range(ROWS)]
    bad = [desk.add("insert", "t", a="seven", b="b"), desk.add("insert", "t", a=7, b="bbbb")]
    outcome = desk.flush()
    assert dead(outcome) == [(bad[0], "22P02"), (bad[1], "22001")]
    assert sorted(outcome.written) == numbers


def test_a_child_without_its_parent_is_held_and_the_others_arrive(desk: Desk):
    desk.sql(
        "CREATE TABLE p (id int PRIMARY KEY);"
        "CREATE TABLE t (k int PRIMARY KEY, v int,"
        " p int REFERENCES p DEFERRABLE INITIALLY DEFERRED)"
    )
    desk.sql("INSERT INTO p VALUES (1)")
    numbers = add_many(desk, p=1)
    child = desk.add("insert", "t", k=1000, p=2)
    outcome = desk.flush(hold=always)
    assert held(outcome) == [(child, "23503")]
    assert sorted(outcome.written) == numbers
    desk.add("insert", "p", id=2)
    assert child in desk.flush(hold=always).written


def test_a_row_that_another_unique_key_forbids_dies_alone(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, u text UNIQUE)")
    for k in range(ROWS):
        desk.add("insert", "t", k=k, u=f"u{k}" if k != 9 else "u3")
    outcome = desk.flush()
    assert [sqlstate for _, sqlstate in dead(outcome)] == ["23505"]
    assert count(desk) == ROWS - 1


def test_generated_columns_that_are_given_are_refused_as_ever(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, g int GENERATED ALWAYS AS (v + 1) STORED)")
    add_many(desk)
    add_many(desk, start=ROWS, g=1)
    outcome = desk.flush()
    assert {sqlstate for _, sqlstate in dead(outcome)} == {"428C9"}
    assert (len(outcome.dead), count(desk)) == (ROWS, ROWS)
    assert desk.sql("SELECT DISTINCT g FROM t") == [(2,)]


# Tables of other sorts


def test_an_identity_that_is_given_is_kept_and_one_that_is_not_is_made(desk: Desk, copies: Copies):
    desk.sql("CREATE TABLE t (k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)")
    add_many(desk, start=5000)
    for _ in range(ROWS):
        desk.add("insert", "t", v=2)
    desk.flush()
    assert copies == [ROWS, ROWS]
    assert desk.sql("SELECT v, min(k), max(k) FROM t GROUP BY v ORDER BY v") == [
        (1, 5000, 5000 + ROWS - 1),
        (2, 1, ROWS),
    ]


def test_rows_go_into_their_partitions_and_one_without_dies_alone(desk: Desk, copies: Copies):
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, v int) PARTITION BY RANGE (k);"
        "CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (100);"
        "CREATE TABLE t2 PARTITION OF t FOR VALUES FROM (100) TO (1000)"
    )
    add_many(desk)
    desk.flush()
    assert copies == [ROWS]
    assert desk.one("SELECT count(*) FROM t2") == ROWS - 100
    add_many(desk, start=ROWS)
    outside = desk.add("insert", "t", k=5000, v=1)
    assert dead(desk.flush()) == [(outside, "23514")]
    assert count(desk) == 2 * ROWS


def test_a_trigger_that_drops_rows_drops_the_same_ones(desk: Desk):
    desk.sql(
        f"{T}; CREATE TABLE seen (k int);"
        "CREATE FUNCTION drop_some() RETURNS trigger LANGUAGE plpgsql AS $$"
        " BEGIN INSERT INTO seen VALUES (NEW.k);"
        "  IF NEW.k % 3 = 0 THEN RETURN NULL; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER drop_some BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION drop_some()"
    )
    numbers = add_many(desk)
    assert sorted(desk.flush().written) == numbers
    assert desk.one("SELECT count(*) FROM t WHERE k % 3 = 0") == 0
    assert count(desk) == ROWS - 67
    assert desk.one("SELECT count(*) FROM seen") == ROWS


def test_a_trigger_that_changes_rows_changes_them(desk: Desk, copies: Copies):
    desk.sql(
        f"{T}; CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.w := NEW.w || NEW.k; RETURN NEW; END';"
        "CREATE TRIGGER change BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION change()"
    )
    add_many(desk, w="w")
    desk.flush()
    assert copies == [ROWS]
    assert desk.one("SELECT count(*) FROM t WHERE w = 'w' || k") == ROWS


@pytest.mark.parametrize("late", [False, True])
def test_a_rule_is_followed(desk: Desk, late: bool):
    # Without ON CONFLICT, which no table with such a rule takes.
    desk.sql("CREATE TABLE t (v int); CREATE TABLE other (v int)")
    rule = "CREATE RULE r AS ON INSERT TO t DO INSTEAD INSERT INTO other VALUES (NEW.v)"
    if late:
        for _ in range(ROWS):
            desk.add("insert", "t", v=1)
        desk.flush()
    desk.sql(rule)
    for _ in range(ROWS):
        desk.add("insert", "t", v=2)
    desk.flush()
    assert desk.one("SELECT count(*) FROM other WHERE v = 2") == ROWS
    assert desk.one("SELECT count(*) FROM t WHERE v = 2") == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_policy_forbids_the_same_rows(desk: Desk, late: bool):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, owner text)")
    with as_role(desk) as role:
        desk.sql(f"GRANT ALL ON t TO {role}")
        if late:
            add_owned(desk, 1000, "me")
            desk.flush()
        desk.sql(
            "ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
            f"CREATE POLICY mine ON t TO {role} USING (owner = 'me') WITH CHECK (owner = 'me')"
        )
        add_owned(desk, 0, "me")
        forbidden = desk.add("insert", "t", k=500, owner="you")
        assert dead(desk.flush()) == [(forbidden, "42501")]
        assert desk.one("SELECT count(*) FROM t WHERE k < 1000") == ROWS


def add_owned(desk: Desk, start: int, owner: str) -> None:
    for k in range(start, start + ROWS):
        desk.add("insert", "t", k=k, owner=owner)


# Rights


@pytest.mark.parametrize(
    "rights",
    ["INSERT", "INSERT, UPDATE", "SELECT, INSERT", "INSERT (k, v), SELECT (k, v)", "SELECT"],
)
def test_a_lane_waits_for_a_right_however_many_rows_there_are(desk: Desk, rights: str):
    desk.sql(T)
    with as_role(desk) as role:
        desk.sql(f"GRANT {rights} ON t TO {role}")
        add_many(desk)
        outcome = desk.flush()
        assert outcome.waiting["t"].sqlstate == "42501"
        assert count(desk) == 0
        desk.sql(f"GRANT SELECT, INSERT, UPDATE ON t TO {role}")
        assert len(desk.flush(probe=True).written) == ROWS


def test_rights_on_the_given_columns_are_enough(desk: Desk, copies: Copies):
    desk.sql(T)
    with as_role(desk) as role:
        desk.sql(f"GRANT INSERT (k, v), UPDATE (v), SELECT (k, v) ON t TO {role}")
        add_many(desk)
        assert len(desk.flush().written) == ROWS
        assert copies == [ROWS]


def test_without_a_key_the_right_to_insert_is_enough(desk: Desk, copies: Copies):
    desk.sql("CREATE TABLE t (k int, v int)")
    with as_role(desk) as role:
        desk.sql(f"GRANT INSERT ON t TO {role}")
        add_many(desk)
        assert len(desk.flush().written) == ROWS


# Others at the same moment


def test_a_key_that_somebody_inserts_after_the_look_is_updated(desk: Desk, copies: Copies):
    desk.sql(T)
    add_many(desk)
    copies.before = lambda: desk.sql("INSERT INTO t VALUES (150, 0, 'theirs')")
    outcome = desk.flush()
    assert len(outcome.written) == ROWS
    assert copies == [-1]
    assert desk.sql("SELECT * FROM t WHERE k = 150") == [(150, 1, "theirs")]
    assert count(desk) == ROWS


def test_two_spools_that_write_the_same_new_keys_wait_for_each_other(desk: Desk, copies: Copies):
    desk.sql(T)
    other = Desk(desk.dsn, spool_id="other")
    try:
        add_many(desk, v=1)
        for k in reversed(range(ROWS)):
            other.add("insert", "t", k=k, v=2)
        thread = threading.Thread(target=other.flush)

        def begin(_: Outcome) -> None:
            thread.start()
            wait_until(
                lambda: desk.one(
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
                ),
                "the other one waits",
            )

        assert len(desk.flush(seal=begin).written) == ROWS
        thread.join()
    finally:
        other.close()
    assert not other.pending
    assert copies == [ROWS, -1]
    assert desk.sql("SELECT v, count(*) FROM t GROUP BY v") == [(2, ROWS)]


def test_a_lock_in_the_middle_makes_the_lane_wait(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PostgresWriter, "LOCK_TIMEOUT", 200)
    desk.sql(f"{T}; CREATE TABLE u (k int PRIMARY KEY)")
    add_many(desk)
    other_table = desk.add("insert", "u", k=1)
    with psycopg.connect(desk.dsn) as other:
        other.execute("INSERT INTO t VALUES (150, 0, 'theirs')")
        outcome = desk.flush()
        assert outcome.waiting["t"].sqlstate == "55P03"
        assert outcome.written == (other_table,)
    assert len(desk.flush(probe=True).written) == ROWS
    assert desk.sql("SELECT * FROM t WHERE k = 150") == [(150, 1, "theirs")]


def test_a_time_limit_in_the_middle_ends_the_flush_and_nothing_is_lost(
    desk: Desk, copies: Copies, monkeypatch: pytest.MonkeyPatch
):
    desk.sql(
        f"{T}; CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(10); RETURN NEW; END';"
        "CREATE TRIGGER slow BEFORE INSERT ON t FOR EACH ROW WHEN (NEW.k = 150)"
        " EXECUTE FUNCTION slow()"
    )
    numbers = add_many(desk)
    with monkeypatch.context() as patch:
        patch.setattr(PostgresWriter, "STATEMENT_TIMEOUT", 200)
        with pytest.raises(FlushFailed) as caught:
            desk.flush()
    assert (caught.value.sqlstate, caught.value.halve) == ("57014", True)
    desk.sql("DROP TRIGGER slow ON t")
    assert sorted(desk.flush().written) == numbers
    assert copies == [-1, ROWS]


def test_a_connection_that_is_cut_in_the_middle_ends_the_flush_and_nothing_is_doubled(
    desk: Desk, copies: Copies
):
    desk.sql(T)
    numbers = add_many(desk)
    copies.before = lambda: desk.sql(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE application_name = 'helena flush' AND datname = current_database()"
    )
    with pytest.raises(FlushFailed):
        desk.flush()
    assert count(desk) == 0
    assert sorted(desk.flush().written) == numbers
    assert copies == [-1, ROWS]
    assert count(desk) == ROWS


# A table that was altered since its catalog was read


@pytest.mark.parametrize("key", ["PRIMARY KEY", ""])
@pytest.mark.parametrize(
    ("before", "after", "value", "expected"),
    [
        ("text", "jsonb USING to_jsonb(x)", "5", '"5"'),
        ("text", "json USING to_json(x)", "null", '"null"'),
        ("int[]", "jsonb USING to_jsonb(x)", [], "[]"),
        ("text[]", "jsonb USING to_jsonb(x)", ["a"], '["a"]'),
        ("jsonb", "text", {"a": 1}, '{"a": 1}'),
        ("jsonb", "text[] USING ARRAY[x]", ["a"], "{a}"),
        ("int", "text", 5, "5"),
        ("text", "int USING x::int", "5", "5"),
        ("text", "text[] USING ARRAY[x]", "{}", "{}"),
    ],
)
def test_lines_that_were_made_for_another_type_are_not_taken_for_this_one(
    desk: Desk, key: str, before: str, after: str, value: Any, expected: str
):
    desk.sql(f"CREATE TABLE t (k int {key}, x {before})")
    first = {"jsonb": "1", "int": 1}.get(before, "{1}" if "[" in before else "1")
    for k in range(ROWS):
        desk.add("insert", "t", k=k, x=first)
    desk.flush()
    for k in range(ROWS):
        desk.add("insert", "t", k=ROWS + k, x=value)
    reading = desk.writer.read_ahead(list(desk.pending.values()))
    desk.sql(f"ALTER TABLE t ALTER x TYPE {after}")
    outcome = desk.flush(ahead=reading)
    assert len(outcome.written) == ROWS
    assert desk.sql(f"SELECT DISTINCT x::text FROM t WHERE k >= {ROWS}") == [(expected,)]


def test_columns_that_changed_places_keep_their_values(desk: Desk, copies: Copies):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, a text, b text)")
    for start in (0, ROWS):
        for k in range(start, start + ROWS):
            desk.add("insert", "t", k=k, a="a", b="b")
        reading = desk.writer.read_ahead(list(desk.pending.values()))
        if start:
            desk.sql("ALTER TABLE t DROP a; ALTER TABLE t ADD a text")
        desk.flush(ahead=reading)
    assert desk.sql(f"SELECT DISTINCT a, b FROM t WHERE k >= {ROWS}") == [("a", "b")]


def test_a_column_that_was_dropped_makes_dead_letters_and_not_other_columns(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, a text, b text)")
    for start in (0, ROWS):
        for k in range(start, start + ROWS):
            desk.add("insert", "t", k=k, a="a", b="b")
        if start:
            desk.sql("ALTER TABLE t DROP a")
        outcome = desk.flush()
    assert {sqlstate for _, sqlstate in dead(outcome)} == {"42703"}
    assert count(desk) == ROWS


def test_there_is_time_for_other_work_once_the_server_has_its_first_lines(helena_dsn: str):
    events: list[str] = []

    def blocks() -> Iterator[bytes]:
        for line in ("1\n", "2\n"):
            events.append(line)
            yield line.encode()

    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (k int)")
        transaction = Transaction(connection, lambda: events.append("busy"))
        transaction.begin(lock_timeout=0, statement_timeout=0, idle_timeout=0)
        assert transaction.copy(b"COPY t FROM STDIN", blocks()) == 2
        assert events == ["1\n", "busy", "2\n"]
        assert transaction.copy(b"COPY t FROM STDIN", []) == 0
        transaction.commit()
