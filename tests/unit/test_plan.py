"""What a flush writes and in which order, decided without a database."""

import json
from typing import Any

import pytest
from msgspec import Raw

from helena_cli.batch import plan
from helena_cli.batch.operation import Kind, Operation
from helena_cli.batch.plan import Blocked, Mode, Plan, backoff, flush_due
from helena_cli.batch.reading import Reader, Step
from helena_cli.batch.table import (
    Column,
    ForeignKey,
    Special,
    Table,
    canonical,
    key_value,
    parents_first,
)

COLUMNS = (
    Column("id", "integer", "integer"),
    Column("slug", "text", "text"),
    Column("a", "integer", "integer"),
    Column("b", "text", "text"),
    Column("parent", "integer", "integer"),
)
TABLE = Table(1, "public", "things", COLUMNS, keys=(("id",), ("slug",)))
TREE = Table(
    2,
    "public",
    "tree",
    COLUMNS,
    keys=(("id",),),
    foreign_keys=(ForeignKey("tree_parent_fkey", ("parent",), 2, "public", "tree", True),),
)


def operation(number: int, kind: Kind = "insert", due: bool = True, **values: Any) -> Operation:
    return Operation(number, kind, "things", json.dumps(values).encode(), due=due)


def arrange(*operations: Operation, table: Table = TABLE) -> Plan:
    reader = Reader(table)
    steps, dead = reader.read(operations)
    assert not dead
    return plan.arrange(reader, steps, Blocked(reader))


def ids(arranged: Plan) -> list[list[list[int]]]:
    """The ids of each row of each group."""
    return [
        [[s.operation.id for s in row.steps] for row in group.rows] for group in arranged.groups
    ]


def written(arranged: Plan, table: Table = TABLE) -> list[dict[str, Any]]:
    reader = Reader(table)
    return [json.loads(plan.data(reader, row)) for group in arranged.groups for row in group.rows]


def value(equality: Any, encoded: str, length: int | None = None) -> Any:
    return canonical(Column("k", "?", equality, length), Raw(encoded.encode()))


@pytest.mark.parametrize("data", [b"", b"\0\0\0", b'{"id": 1', b"[1]", b'{"\xff": 1}'])
def test_an_operation_that_damage_made_unreadable_is_dead_and_holds_up_nobody(data: bytes):
    broken = Operation(1, "insert", "things", data)
    steps, dead = Reader(TABLE).read([broken, operation(2, id=2)])
    assert [step.operation.id for step in steps] == [2]
    assert [(verdict.operation_id, verdict.sqlstate) for verdict in dead] == [(1, "HL005")]


@pytest.mark.parametrize(
    ("equality", "left", "right"),
    [
        ("integer", "1", '"1"'),
        ("integer", "1", '" +001\\n"'),
        ("integer", "-0", "0"),
        ("text", "1", '"1"'),
        ("text", "1.50", '"1.50"'),
        ("text", "true", '"true"'),
        ("text", '"\\u00e9"', '"é"'),
        ("text", '{"a": 1}', '"{\\"a\\": 1}"'),
        (
            "uuid",
            '"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"',
            '"{a0eebc999c0b-4ef8bb6d6bb9bd380a11}"',
        ),
        ("uuid", "11111111111111111111111111111111", '"11111111-1111-1111-1111-111111111111"'),
    ],
)
def test_equal_keys_have_one_canonical_value(equality: str, left: str, right: str):
    assert value(equality, left) == value(equality, right)
    assert not isinstance(value(equality, left), Special)


@pytest.mark.parametrize(
    ("equality", "left", "right"),
    [
        ("integer", "1", "-1"),
        ("text", '"a"', '"A"'),
        ("text", '"a"', '"a "'),
        ("text", "1", '"1.0"'),
    ],
)
def test_different_keys_have_different_values(equality: str, left: str, right: str):
    assert value(equality, left) != value(equality, right)


@pytest.mark.parametrize(
    ("equality", "encoded"),
    [
        ("integer", '"one"'),
        ("integer", "1.0"),
        ("integer", "1e3"),
        ("integer", "true"),
        ("integer", '""'),
        ("integer", '"\\u0661"'),
        ("integer", "9" * 5000),
        ("integer", "[1]"),
        ("uuid", '"a0eebc99"'),
        ("uuid", '"{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"'),
    ],
)
def test_a_value_that_the_type_refuses_equals_no_key(equality: str, encoded: str):
    assert value(equality, encoded) is Special.BAD


def test_only_the_database_decides_the_other_types():
    assert value("database", "1.50") is Special.UNDECIDED
    assert value("integer", '"0x10"') is Special.UNDECIDED
    assert value("integer", '"1_000"') is Special.UNDECIDED


def test_a_long_text_loses_only_spaces():
    assert value("text", '"abc  "', length=3) == "abc"
    assert value("text", '"abcd"', length=3) is Special.BAD
    assert value("text", '"abc "', length=None) == "abc "


def test_a_null_in_a_key_means_that_the_key_is_not_given():
    columns = (Column("x", "integer", "integer"), Column("y", "numeric", "database"))
    values = {"x": Raw(b"null"), "y": Raw(b"1")}
    assert key_value(columns, values) is Special.NULL
    assert key_value(columns, {**values, "x": Raw(b'"no"')}) is Special.BAD
    assert key_value(columns, {**values, "x": Raw(b"1")}) is Special.UNDECIDED
    assert key_value(columns[:1] * 2, {"x": Raw(b"1")}) == (1, 1)


def steps(*operations: Operation, table: Table = TABLE) -> list[Step]:
    return Reader(table).read(operations)[0]


def test_the_first_key_that_is_given_and_not_null_is_chosen():
    found = steps(
        operation(1, id=1, slug="x"),
        operation(2, id=None, slug="x"),
        operation(3, slug="x"),
        operation(4, id=None, slug=None, a=1),
        operation(5, a=1),
    )
    assert [step.key for step in found] == [0, 1, 1, None, None]


def test_an_update_without_a_whole_key_is_refused_and_says_which_keys_there_are():
    found, dead = Reader(TABLE).read([operation(7, "update", a=1), operation(8, "update", id=None)])
    assert not found
    assert [(verdict.operation_id, verdict.sqlstate) for verdict in dead] == [
        (7, "HL001"),
        (8, "HL001"),
    ]
    assert "(id) or (slug)" in dead[0].message


def test_an_unknown_column_concerns_its_own_operation_only():
    reader = Reader(TABLE)
    found, dead = reader.read([operation(1, id=1), operation(2, id=1, zebra=1)])
    assert [step.operation.id for step in found] == [1]
    assert (dead[0].operation_id, dead[0].sqlstate) == (2, "42703")
    assert "zebra" in dead[0].message


def test_an_operation_that_is_not_due_is_not_judged():
    assert Reader(TABLE).read([operation(1, due=False, id=1, zebra=1)]) == ([], [])


def test_operations_on_one_key_merge_and_the_last_value_wins():
    arranged = arrange(
        operation(1, id=1, a=1, b="one"),
        operation(2, "update", id="1", b="two"),
        operation(3, "update", id=1, slug="s"),
    )
    assert ids(arranged) == [[[1, 2, 3]]]
    assert written(arranged) == [{"id": 1, "a": 1, "b": "two", "slug": "s"}]
    assert arranged.groups[0].columns.names == ("id", "slug", "a", "b")


def test_an_explicit_null_wins_like_any_value():
    arranged = arrange(operation(1, id=1, b="one"), operation(2, "update", id=1, b=None))
    assert written(arranged) == [{"id": 1, "b": None}]


def test_a_merged_row_keeps_the_key_as_it_was_first_written():
    arranged = arrange(operation(1, id="01", a=1), operation(2, id=1, a=2))
    assert written(arranged) == [{"id": "01", "a": 2}]


def test_an_operation_that_is_not_merged_is_written_byte_for_byte():
    data = b'{"b":  "\\u00e9",   "id":1}'
    reader = Reader(TABLE)
    found, _ = reader.read([Operation(1, "insert", "things", data)])
    arranged = plan.arrange(reader, found, Blocked(reader))
    assert plan.data(reader, arranged.groups[0].rows[0]) == data


def test_a_message_is_a_barrier_and_is_never_merged():
    arranged = arrange(
        operation(1, id=1, a=1),
        operation(2, "update", id=1, a=2),
        operation(3, "message", id=1, a=3),
        operation(4, "message", id=1, a=4),
        operation(5, "update", id=1, a=5),
        operation(6, "update", id=1, a=6),
    )
    assert ids(arranged) == [[[1, 2]], [[3]], [[4]], [[5, 6]]]
    modes = [group.mode for group in arranged.groups]
    assert modes == [Mode.UPSERT, Mode.MESSAGE, Mode.MESSAGE, Mode.UPSERT]


def test_one_statement_serves_each_set_of_columns_in_whatever_order_they_are_given():
    arranged = arrange(
        operation(1, id=1, a=1),
        operation(2, a=2, id=2),
        operation(3, id=3, b="x"),
        operation(4, "update", id=4, a=4),
    )
    assert ids(arranged) == [[[1], [2], [4]], [[3]]]


def test_rows_are_locked_in_the_order_of_their_keys():
    arranged = arrange(operation(1, id=30, a=1), operation(2, id=4, a=1), operation(3, id="5", a=1))
    rows = plan.by_key(arranged.groups[0].rows)
    assert [row.value for row in rows] == [4, 5, 30]


def test_rows_with_unreadable_keys_go_last_and_do_not_merge():
    arranged = arrange(
        operation(1, id="x", a=1), operation(2, id=2, a=1), operation(3, id="x", a=2)
    )
    rows = plan.by_key(arranged.groups[0].rows)
    assert [row.first.operation.id for row in rows] == [2, 1, 3]


def test_rows_without_a_key_keep_the_order_of_their_ids():
    arranged = arrange(*(operation(number, a=100 - number) for number in range(1, 6)))
    assert [row.first.operation.id for row in plan.by_key(arranged.groups[0].rows)] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert arranged.groups[0].mode is Mode.INSERT


def test_a_change_of_the_key_cuts_the_stream():
    arranged = arrange(
        operation(1, id=1, a=1),
        operation(2, slug="s", a=2),
        operation(3, id=1, a=3),
        operation(4, a=4),
        operation(5, id=1, a=5),
    )
    # What has no key is independent of the others.
    assert ids(arranged) == [[[1]], [[4]], [[2]], [[3, 5]]]


def test_rows_that_may_refer_to_their_own_table_go_after_their_parents():
    arranged = arrange(operation(1, id=9, parent=1), operation(2, id=1, a=1), table=TREE)
    assert ids(arranged) == [[[2]], [[1]]]


def test_a_later_operation_never_overtakes_one_that_is_held():
    arranged = arrange(
        operation(1, id=1, a=1),
        operation(2, due=False, id=1, a=2),
        operation(3, id=1, a=3),
        operation(4, "message", id="1", a=4),
        operation(5, id=2, a=5),
    )
    assert ids(arranged) == [[[1], [5]]]
    assert [(v.operation_id, v.sqlstate) for v in arranged.held] == [(3, "HL002"), (4, "HL002")]
    assert "operation 2" in arranged.held[1].message


def test_a_held_operation_blocks_its_row_by_every_key_that_it_gives():
    arranged = arrange(
        operation(1, due=False, id=1, slug="s"),
        operation(2, slug="s", a=2),
        operation(3, slug="t", a=3),
    )
    assert [v.operation_id for v in arranged.held] == [2]
    assert ids(arranged) == [[[3]]]


def test_what_waits_for_a_held_operation_blocks_its_own_keys_too():
    arranged = arrange(
        operation(1, due=False, id=1),
        operation(2, id=1, slug="s"),
        operation(3, "update", slug="s", a=3),
    )
    assert [v.operation_id for v in arranged.held] == [2, 3]
    assert all("operation 1" in v.message for v in arranged.held)


def test_a_held_operation_without_a_key_blocks_nothing():
    arranged = arrange(operation(1, due=False, a=1), operation(2, a=1), operation(3, id=1))
    assert ids(arranged) == [[[2]], [[3]]] and not arranged.held


def test_merged_rows_come_apart_in_order():
    arranged = arrange(
        operation(1, id=1, a=1),
        operation(2, id=1, a=2),
        operation(3, id=2, a=3),
        operation(4, id=1, b="x"),
    )
    rows = [row for group in arranged.groups for row in group.rows]
    apart = [[row.first.operation.id for row in group] for group in plan.unmerge(rows)]
    assert [number for group in apart for number in group if number != 3] == [1, 2, 4]
    for parts in plan.unmerge(rows):
        assert all(row.columns is row.first.columns is parts[0].columns for row in parts)


def test_a_part_of_a_merged_row_gives_only_its_own_columns():
    reader = Reader(TABLE)
    found, _ = reader.read([operation(1, id=1, a=1), operation(2, id=1, b="x")])
    (group,) = plan.arrange(reader, found, Blocked(reader)).groups
    part = plan.part(reader, group.rows[0], found[1:])
    assert part.columns.names == ("id", "b")
    assert json.loads(plan.data(reader, part)) == {"id": 1, "b": "x"}


def related(oid: int, *parents: int) -> Table:
    keys = tuple(ForeignKey(f"f{p}", ("x",), p, "public", f"t{p}", True) for p in parents)
    return Table(oid, "public", f"t{oid}", (), foreign_keys=keys)


def order(*tables: Table, first: dict[int, int] | None = None) -> list[int]:
    ids = first or {table.oid: table.oid for table in tables}
    return [table.oid for table in parents_first(tables, ids)]


def test_parents_are_written_before_their_children():
    assert order(related(1, 2), related(2, 3), related(3), related(4)) == [3, 2, 1, 4]


def test_a_table_that_refers_to_itself_is_no_cycle():
    assert order(related(1, 1, 2), related(2)) == [2, 1]


def test_a_cycle_begins_with_the_oldest_operation():
    cycle = [related(1, 2), related(2, 3), related(3, 1)]
    assert order(*cycle, first={1: 30, 2: 10, 3: 20}) == [2, 1, 3]


def test_a_cycle_is_broken_in_itself_and_not_at_a_child_of_it():
    tables = [related(1, 2), related(2, 3), related(3, 2)]
    assert order(*tables) == [2, 1, 3]


def test_parents_outside_the_batch_do_not_matter():
    assert order(related(1, 99), related(2)) == [1, 2]


@pytest.mark.parametrize(
    ("count", "age", "due"),
    [
        (0, None, False),
        (1, None, False),
        (1, 4.9, False),
        (1, 5.0, True),
        (99, 0.0, False),
        (100, 0.0, True),
        (101, None, True),
        (1, -0.1, True),
        (0, 9.0, False),
    ],
)
def test_a_flush_is_due_by_count_or_age_or_when_the_clock_was_set_back(
    count: int, age: float | None, due: bool
):
    assert flush_due(count, age, size=100, interval=5.0) is due


def test_retries_wait_longer_each_time_up_to_the_cap():
    delays = [backoff(attempt, random=lambda: 0.0) for attempt in (0, 1, 2, 8, 9, 10_000)]
    assert delays == [0.2, 0.4, 0.8, 51.2, 60.0, 60.0]


def test_jitter_takes_off_at_most_half():
    assert backoff(3, base=1.0, cap=4.0, random=lambda: 1.0) == 2.0
    assert backoff(-1, base=1.0, random=lambda: 0.5) == 0.75
