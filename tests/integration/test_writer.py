"""What a flush does to tables when nothing is wrong. Real PostgreSQL."""

import json
import threading
from typing import Any

import psycopg
import pytest

from helena_cli.batch.flush import Waiting
from helena_cli.database.writer import PostgresWriter
from tests.writing import Counting, Desk, always

pytestmark = pytest.mark.postgres


def document(number: int, **more: Any) -> dict[str, Any]:
    return {"es_index": "i", "es_doc_id": f"ns:{number}.md", **more}


def test_an_insert_gives_the_columns_that_are_left_out_their_defaults(desk: Desk):
    first = desk.add("insert", "es_document_references", **document(1, tags=["a", "b"]))
    outcome = desk.flush()
    assert outcome.written == (first,)
    assert outcome.rows == 1
    assert outcome.settled_tables == {"es_document_references"}
    assert desk.sql(
        "SELECT es_doc_id, data_classification, indexed_at IS NOT NULL, tags, metadata"
        " FROM es_document_references"
    ) == [("ns:1.md", "public", True, ["a", "b"], None)]


def test_an_insert_on_an_existing_key_keeps_the_columns_that_are_not_given(desk: Desk):
    desk.add("insert", "es_document_references", **document(1, issuer="x", filename="f"))
    desk.flush()
    desk.add("insert", "es_document_references", **document(1, filename="g"))
    desk.flush()
    assert desk.sql("SELECT issuer, filename FROM es_document_references") == [("x", "g")]


def test_an_update_changes_a_row_without_its_mandatory_columns(desk: Desk):
    desk.sql("INSERT INTO messages (id, sender, message_type, content) VALUES ('1', 'a', 'b', 'c')")
    number = desk.add("update", "messages", id="1", importance=0.25)
    assert desk.flush().written == (number,)
    assert desk.sql("SELECT sender, importance FROM messages") == [("a", 0.25)]


def test_an_update_of_an_absent_row_inserts_it_with_its_defaults(desk: Desk):
    desk.add("update", "messages", id="1", sender="a", message_type="b", content="c")
    desk.flush()
    assert desk.sql("SELECT sender, importance FROM messages") == [("a", 0.5)]


def test_a_message_whose_key_exists_is_left_alone_and_counts_as_written(desk: Desk):
    desk.sql("INSERT INTO messages (id, sender, message_type, content) VALUES ('1', 'a', 'b', 'c')")
    numbers = [
        desk.add("message", "messages", id=text, sender="z", message_type="t", content="new")
        for text in ("1", "2", "2")
    ]
    assert desk.flush().written == tuple(numbers)
    assert desk.sql("SELECT id, content FROM messages ORDER BY id") == [("1", "c"), ("2", "new")]


def test_a_message_is_a_barrier_between_updates_of_its_key(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, w int)")
    desk.add("insert", "t", k=1, v=1)
    desk.add("message", "t", k=1, v=2, w=2)
    desk.add("message", "t", k=2, v=3, w=3)
    desk.add("update", "t", k=2, v=4)
    outcome = desk.flush()
    assert not outcome.coalesced
    assert desk.sql("SELECT * FROM t ORDER BY k") == [(1, 1, None), (2, 4, 3)]


def test_operations_on_one_key_become_one_row_and_the_last_value_wins(desk: Desk):
    numbers = [
        desk.add("insert", "es_document_references", **document(1, issuer="a", filename="a")),
        desk.add("update", "es_document_references", es_doc_id="ns:1.md", issuer="b"),
        desk.add("update", "es_document_references", es_doc_id="ns:1.md", issuer=None),
    ]
    outcome = desk.flush()
    assert (outcome.written, outcome.coalesced, outcome.rows) == ((numbers[2],), (1, 2), 1)
    assert desk.sql("SELECT issuer, filename FROM es_document_references") == [(None, "a")]


def test_only_key_columns_insert_the_row_once_and_change_nothing(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v text DEFAULT 'd', u int UNIQUE DEFAULT 7)")
    desk.add("insert", "t", k=1)
    desk.flush()
    desk.add("update", "t", k=1)
    assert desk.flush().written == (2,)
    # DO NOTHING names its key: another key's violation is not swallowed.
    desk.add("insert", "t", k=2)
    assert [v.sqlstate for v in desk.flush().dead] == ["23505"]
    assert desk.sql("SELECT * FROM t") == [(1, "d", 7)]


def test_existing_rows_take_nothing_from_a_sequence(desk: Desk):
    desk.sql(
        "CREATE SEQUENCE own_n;"
        "CREATE TABLE own (k text PRIMARY KEY, n bigint DEFAULT nextval('own_n'), v int)"
    )
    for _ in range(2):
        for number in range(1000):
            desk.add("insert", "es_document_references", **document(number, filename="f"))
            desk.add("message", "own", k=f"k{number}", v=1)
        desk.flush()
    assert desk.one("SELECT last_value FROM es_document_references_id_seq") == 1000
    assert desk.one("SELECT last_value FROM own_n") == 1000


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("int", 1, "1"),
        ("bigint", 1, " 1"),
        ("smallint", 1, "+1"),
        ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc999c0b4ef8bb6d6bb9bd380a11"),
        ("text", 1, "1"),
        ("varchar(3)", "abc", "abc  "),
        ("char(5)", "a", "a  "),
        ("numeric", "1.0", 1.00),
        ("double precision", 1, "1e0"),
        ("timestamptz", "2026-01-01T00:00:00Z", "2026-01-01T02:00:00+02:00"),
        ("date", "2026-01-01", "Jan 1, 2026"),
        ("boolean", True, "yes"),
        ("interval", "1 day", "24 hours"),
        ("jsonb", {"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ("bytea", "\\x41", "A"),
        ("int[]", [1, 2], "{1,2}"),
        ("inet", "10.0.0.1", "10.0.0.1/32"),
    ],
)
def test_equal_keys_that_are_written_differently_are_one_row(
    desk: Desk, kind: str, first: Any, second: Any
):
    desk.sql(f"CREATE TABLE t (k {kind} PRIMARY KEY, v int)")
    desk.add("insert", "t", k=first, v=1)
    desk.add("update", "t", k=second, v=2)
    outcome = desk.flush()
    assert (outcome.written, outcome.coalesced, outcome.rows) == ((2,), (1,), 1)
    assert desk.sql("SELECT v FROM t") == [(2,)]
    # And against the row in the table.
    desk.add("update", "t", k=first, v=3)
    desk.add("message", "t", k=second, v=4)
    desk.flush()
    assert desk.sql("SELECT v FROM t") == [(3,)]


def test_a_case_insensitive_key_is_one_key_and_keeps_its_first_spelling(desk: Desk):
    desk.sql("CREATE EXTENSION citext; CREATE TABLE t (k citext PRIMARY KEY, v int)")
    desk.add("insert", "t", k="Straße", v=1)
    desk.add("insert", "t", k="STRAßE", v=2)
    desk.add("insert", "t", k="strasse", v=3)
    assert desk.flush().rows == 2
    assert desk.sql("SELECT * FROM t ORDER BY v") == [("Straße", 2), ("strasse", 3)]


def collation_that_ignores_case(desk: Desk) -> None:
    options = "provider = icu, locale = 'und-u-ks-level2', deterministic = false"
    try:
        desk.sql(f"CREATE COLLATION ci ({options})")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("This server was built without ICU.")


def test_a_collation_that_ignores_case_is_respected(desk: Desk):
    collation_that_ignores_case(desk)
    desk.sql("CREATE TABLE t (k text COLLATE ci PRIMARY KEY, v int)")
    for text, v in (("Key", 1), ("KEY", 2), ("kay", 3)):
        desk.add("insert", "t", k=text, v=v)
    assert desk.flush().rows == 2
    desk.add("update", "t", k="kEy", v=9)
    desk.flush()
    assert desk.sql("SELECT k, v FROM t ORDER BY v") == [("kay", 3), ("Key", 9)]


def test_a_key_whose_index_compares_otherwise_is_not_used(desk: Desk):
    collation_that_ignores_case(desk)
    desk.sql("CREATE TABLE t (k text, v int); CREATE UNIQUE INDEX ON t (k COLLATE ci)")
    desk.add("insert", "t", k="a", v=1)
    desk.add("update", "t", k="a", v=2)
    assert [verdict.sqlstate for verdict in desk.flush().dead] == ["HL001"]


def test_a_key_of_several_columns_of_several_kinds(desk: Desk):
    desk.sql("CREATE TABLE t (a int, b numeric, c text, v int, PRIMARY KEY (c, a, b))")
    desk.add("insert", "t", a=1, b=1.0, c="x", v=1)
    desk.add("insert", "t", v=2, c="x", b="1.00", a="1")
    desk.add("insert", "t", a=1, b=1.01, c="x", v=3)
    assert desk.flush().rows == 2
    assert desk.sql("SELECT v FROM t ORDER BY b") == [(2,), (3,)]


def test_only_usable_keys_count(desk: Desk):
    desk.sql(
        "CREATE TABLE t (a int UNIQUE DEFERRABLE, b int, c int, d int, e int, v int,"
        " UNIQUE (d) INCLUDE (v));"
        "CREATE UNIQUE INDEX ON t (b) WHERE b > 0; CREATE UNIQUE INDEX ON t (abs(c))"
    )
    for column in ("a", "b", "c"):
        desk.add("update", "t", **{column: 1, "v": 1})
    usable = desk.add("update", "t", d=1, v=1)
    outcome = desk.flush()
    assert [verdict.sqlstate for verdict in outcome.dead] == ["HL001"] * 3
    assert outcome.written == (usable,)


def test_rows_without_a_key_are_inserted_in_order(desk: Desk):
    desk.sql("CREATE TABLE log (id serial PRIMARY KEY, line int, level text)")
    for line in range(20):
        more = {"level": "high"} if line % 3 == 0 else {}
        desk.add("message" if line % 2 else "insert", "log", line=line, **more)
    desk.flush()
    for level in ("IS NULL", "IS NOT NULL"):
        lines = [
            row[0] for row in desk.sql(f"SELECT line FROM log WHERE level {level} ORDER BY id")
        ]
        assert lines == sorted(lines)
    assert desk.one("SELECT count(*) FROM log") == 20


def test_operations_by_different_keys_of_one_row_keep_their_order(desk: Desk):
    desk.sql("CREATE TABLE t (id int PRIMARY KEY, slug text UNIQUE, v int)")
    desk.add("insert", "t", id=1, slug="a", v=1)
    desk.add("update", "t", slug="a", v=2)
    desk.add("update", "t", id=1, slug="b", v=3)
    desk.add("update", "t", slug="b", v=4)
    desk.add("update", "t", id=1, v=5)
    outcome = desk.flush()
    assert not outcome.dead
    assert desk.sql("SELECT * FROM t") == [(1, "b", 5)]


def test_two_names_of_one_table_are_one_stream(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int)")
    for number in range(11):
        desk.add("update", "public.t" if number % 2 else "t", k=1, v=number)
    outcome = desk.flush()
    assert outcome.rows == 1
    assert outcome.settled_tables == {"t", "public.t"}
    assert desk.sql("SELECT * FROM t") == [(1, 10)]
    assert desk.position("t") == (11, [])
    assert desk.position("public.t") == (10, [])


def test_names_are_taken_literally(desk: Desk):
    desk.sql(
        'CREATE SCHEMA "My Schema"; CREATE TABLE "My Schema"."a ""b"" %s" ('
        '"Key %" int PRIMARY KEY, "sel{e}ct" text, "$1" text, "t" int, r int, u int, n int)'
    )
    values = {"Key %": 1, "sel{e}ct": "x", "$1": "y", "t": 1, "r": 2, "u": 3, "n": 4}
    for kind in ("insert", "message", "update"):
        desk.add_json(kind, 'My Schema.a "b" %s', json.dumps(values))
        assert desk.flush().rows == 1
    assert desk.sql('SELECT * FROM "My Schema"."a ""b"" %s"') == [(1, "x", "y", 1, 2, 3, 4)]
    desk.add("insert", "MESSAGES", id="1")
    assert desk.flush().waiting["MESSAGES"].sqlstate == "42P01"


def test_a_key_may_be_named_like_anything_that_the_statements_use(desk: Desk):
    desk.sql(
        "CREATE TABLE t (n numeric, ordinality numeric, k0 numeric, v int,"
        " PRIMARY KEY (n, ordinality, k0))"
    )
    desk.add("insert", "t", n=1, ordinality=1, k0="1.0", v=1)
    desk.add("insert", "t", n=1, ordinality=1, k0=1, v=2)
    assert desk.flush().rows == 1


def test_a_name_that_is_too_long_means_what_postgresql_makes_of_it(desk: Desk):
    name = "n" * 70
    desk.sql(f"CREATE TABLE {name} (k int PRIMARY KEY, v int)")
    desk.add("insert", name, k=1, v=1)
    assert desk.flush().rows == 1


def test_values_of_every_kind_arrive_as_they_are(desk: Desk):
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, j jsonb, js json, a text[], m int[], n numeric,"
        " f float8, b bytea, x boolean, ts timestamptz, d date, i interval, big bigint)"
    )
    desk.add(
        "insert",
        "t",
        k=1,
        j={"ä": [1, None, "'\"\\\n"]},
        js="text",
        a=["x", None, "y,{}"],
        m=[[1, 2], [3, 4]],
        n=1e-20,
        f=0.1,
        b="\\x00ff",
        x=False,
        ts="2026-02-03T04:05:06.789Z",
        d="2026-02-03",
        i="PT1M",
        big=2**63 - 1,
    )
    desk.flush()
    assert desk.sql(
        "SELECT j, js, a, m, n = 1e-20, f, b, x, ts = '2026-02-03 04:05:06.789+00', d::text,"
        " i::text, big FROM t"
    ) == [
        (
            {"ä": [1, None, "'\"\\\n"]},
            "text",
            ["x", None, "y,{}"],
            [[1, 2], [3, 4]],
            True,
            0.1,
            b"\x00\xff",
            False,
            True,
            "2026-02-03",
            "00:01:00",
            2**63 - 1,
        )
    ]


def test_parents_and_children_go_in_together_whatever_their_order(desk: Desk):
    desk.add("insert", "es_document_usage_log", es_doc_id="ns:1.md", accessed_by="me")
    desk.add("insert", "es_document_references", **document(1))
    outcome = desk.flush()
    assert len(outcome.written) == 2


def test_a_reply_goes_in_with_what_it_replies_to(desk: Desk):
    desk.add(
        "message", "messages", id="2", response_to="1", sender="s", message_type="t", content=""
    )
    desk.add("message", "messages", id="1", sender="s", message_type="t", content="")
    assert len(desk.flush().written) == 2


def test_tables_that_refer_to_each_other_are_written_in_two_flushes(desk: Desk):
    desk.sql(
        "CREATE TABLE a (k int PRIMARY KEY, b int);"
        "CREATE TABLE b (k int PRIMARY KEY, a int REFERENCES a);"
        "ALTER TABLE a ADD FOREIGN KEY (b) REFERENCES b"
    )
    desk.add("insert", "b", k=1, a=None)
    desk.add("insert", "a", k=1, b=1)
    last = desk.add("update", "b", k=1, a=1)
    assert [verdict.operation_id for verdict in desk.flush(hold=always).held] == [last]
    assert desk.flush(hold=always).written == (last,)
    assert desk.sql("SELECT * FROM a, b") == [(1, 1, 1, 1)]


def test_an_identity_that_is_given_overrides_the_generated_one(desk: Desk):
    desk.sql("CREATE TABLE t (k int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)")
    desk.add("insert", "t", k=41, v=1)
    desk.add("insert", "t", v=2)
    desk.add("message", "t", k=42, v=3)
    desk.flush()
    desk.add("update", "t", k=41, v=4)
    assert not desk.flush().dead
    assert desk.sql("SELECT * FROM t ORDER BY k") == [(1, 2), (41, 4), (42, 3)]


def test_generated_columns_and_domains_that_are_not_given_do_no_harm(desk: Desk):
    desk.sql(
        "CREATE DOMAIN positive AS int NOT NULL CHECK (VALUE > 0);"
        "CREATE TABLE t (k int PRIMARY KEY, v int, twice int GENERATED ALWAYS AS (v * 2) STORED,"
        " p positive DEFAULT 1)"
    )
    desk.add("insert", "t", k=1, v=1)
    desk.flush()
    desk.add("update", "t", k=1, v=2)
    assert not desk.flush().dead
    assert desk.sql("SELECT * FROM t") == [(1, 2, 4, 1)]


def test_partitioned_tables_are_tables(desk: Desk):
    desk.sql(
        "CREATE TABLE t (k int, day date, v int, PRIMARY KEY (k, day)) PARTITION BY RANGE (day);"
        "CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');"
        "CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')"
    )
    desk.add("insert", "t", k=1, day="2026-01-05", v=1)
    desk.add("insert", "t", k=1, day="2026-02-05", v=2)
    desk.add("update", "t", k=1, day="5 Feb 2026", v=3)
    outsider = desk.add("insert", "t", k=1, day="2027-02-05", v=1)
    outcome = desk.flush()
    assert [verdict.operation_id for verdict in outcome.dead] == [outsider]
    assert desk.sql("SELECT v FROM t ORDER BY day") == [(1,), (3,)]


def test_a_view_takes_plain_inserts(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int); CREATE VIEW w AS SELECT * FROM t")
    desk.add("insert", "w", k=1, v=1)
    assert desk.flush().rows == 1


def test_somebody_who_inserts_the_key_at_the_same_moment_does_no_harm(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int, w int)")
    with psycopg.connect(desk.dsn) as other:
        other.execute("INSERT INTO t VALUES (1, 1, 1)")
        desk.add("insert", "t", k=1, v=2)
        desk.add("message", "t", k=1, v=3)
        flush = threading.Thread(target=desk.flush)
        flush.start()
        while not desk.one(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND application_name = 'helena flush' AND datname = current_database()"
        ):
            pass
        other.commit()
        flush.join()
    assert desk.sql("SELECT * FROM t") == [(1, 2, 1)]


def test_a_flush_leaves_nothing_in_the_session_and_reuses_the_connection(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int)")
    pids = set()
    for number in range(10):
        desk.add("insert", "t", k=number, v=1)
        desk.flush()
        pids |= {
            row[0]
            for row in desk.sql(
                "SELECT pid, state FROM pg_stat_activity WHERE application_name = 'helena flush'"
                " AND datname = current_database() AND state = 'idle'"
            )
        }
    assert len(pids) == 1
    assert desk.connected == ["flush"]
    (session,) = desk.sessions
    assert session.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
    for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
        assert session.execute(f"SHOW {name}").fetchone() == ("0",)
    assert desk.one("SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0


def test_the_settings_of_the_role_do_not_change_what_is_written(desk: Desk):
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, at timestamptz);"
        "DO $$ BEGIN EXECUTE format("
        "'ALTER DATABASE %I SET timezone = %L', current_database(), 'Asia/Tokyo');"
        "EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable',"
        " current_database());"
        "EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on',"
        " current_database());"
        "EXECUTE format('ALTER DATABASE %I SET statement_timeout = 1', current_database());"
        "END $$"
    )
    desk.add("insert", "t", k=1, at="2026-01-01T00:00:00")
    assert desk.flush().rows == 1
    assert desk.one("SELECT at = '2026-01-01 00:00+00' FROM t") is True


def test_a_role_that_may_not_create_anything_can_flush(desk: Desk, helena_dsn: str):
    desk.sql(
        "CREATE TABLE t (k int PRIMARY KEY, v int);"
        "REVOKE ALL ON SCHEMA public FROM PUBLIC; GRANT USAGE ON SCHEMA public TO PUBLIC;"
        "DO $$ BEGIN EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());"
        "END $$"
    )
    role = f"helena_{desk.one('SELECT md5(random()::text)')[:8]}"
    desk.sql(f"CREATE ROLE {role}; GRANT SELECT, INSERT, UPDATE ON t TO {role}")

    def connect(purpose: str) -> psycopg.Connection[Any]:
        connection = desk.connect(purpose)
        connection.execute(f"SET ROLE {role}".encode())
        return connection

    writer, desk.writer = desk.writer, PostgresWriter(connect, host="test")
    try:
        for v in (1, 2):
            desk.add("insert", "t", k=1, v=v)
            assert desk.flush().rows == 1
        assert desk.sql("SELECT * FROM t") == [(1, 2)]
    finally:
        desk.writer.close()
        desk.writer = writer
        desk.sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_flush_takes_few_round_trips(desk: Desk):
    desk.sql("CREATE TABLE a (k int PRIMARY KEY, v int); CREATE TABLE b (k int PRIMARY KEY, v int)")
    for _ in range(2):
        for number in range(500):
            desk.add("insert", "a", k=number, v=1)
            desk.add("insert", "b", k=number, v=1)
        before = Counting.trips
        assert desk.flush().rows == 1000
        trips = Counting.trips - before
    # BEGIN, positions, each table, and the move of the positions, with savepoints; COMMIT. And for
    # each table the look that finds its rows there.
    assert trips <= 13


def test_a_lane_of_which_everything_was_settled_before_needs_no_table(desk: Desk):
    desk.sql("CREATE TABLE t (k int PRIMARY KEY, v int)")
    desk.add("insert", "t", k=1, v=1)
    operation = desk.pending[1]
    desk.flush()
    desk.sql("DROP TABLE t")
    desk.pending[1] = operation
    outcome = desk.flush()
    assert (outcome.skipped, outcome.waiting) == ((1,), {})


def test_an_empty_flush_of_waiting_lanes_is_a_flush(desk: Desk):
    desk.add("insert", "nowhere", k=1)
    outcome = desk.flush()
    assert isinstance(outcome.waiting["nowhere"], Waiting)
    assert desk.sealed == [outcome]
    assert not outcome.settled_tables and desk.pending
