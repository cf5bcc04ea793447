"""Whatever the stream of operations, the plan keeps their order and loses none."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from helena_cli.batch import plan
from helena_cli.batch.operation import Operation
from helena_cli.batch.plan import Blocked, Mode, Plan, backoff
from helena_cli.batch.reading import Reader, Step
from helena_cli.batch.table import Column, ForeignKey, Special, Table, parents_first

COLUMNS = (
    Column("id", "integer", "integer"),
    Column("slug", "text", "text"),
    Column("a", "integer", "integer"),
    Column("b", "text", "text"),
)
ONE_KEY = Table(1, "public", "t", COLUMNS, keys=(("id",),))
TWO_KEYS = Table(1, "public", "t", COLUMNS, keys=(("id",), ("slug",)))

identifiers = st.sampled_from([1, "1", " 1", 2, "02", 3, "x", None])
rows = st.fixed_dictionaries(
    {},
    optional={
        "id": identifiers,
        "slug": st.sampled_from(["s", "t", None]),
        "a": st.integers(0, 9),
        "b": st.none() | st.sampled_from("xyz"),
    },
)
kinds = st.sampled_from(["insert", "update", "message"])
streams = st.lists(st.tuples(kinds, rows, st.sampled_from([True, True, True, False])), max_size=25)


def operations(stream: Sequence[tuple[Any, dict[str, Any], bool]]) -> list[Operation]:
    return [
        Operation(number, kind, "t", json.dumps(data).encode(), due=due)
        for number, (kind, data, due) in enumerate(stream)
    ]


def arrange(table: Table, stream: Sequence[Operation]) -> tuple[list[Step], set[int], Plan]:
    reader = Reader(table)
    steps, dead = reader.read(stream)
    arranged = plan.arrange(reader, steps, Blocked(reader))
    return steps, {verdict.operation_id for verdict in dead}, arranged


@given(streams)
def test_every_due_operation_is_written_held_or_dead_exactly_once(stream: Any):
    ops = operations(stream)
    _, dead, arranged = arrange(TWO_KEYS, ops)
    found = [s.operation.id for g in arranged.groups for row in g.rows for s in row.steps]
    found += [verdict.operation_id for verdict in arranged.held]
    assert sorted([*found, *dead]) == [op.id for op in ops if op.due]


@given(streams)
def test_operations_that_may_concern_one_row_are_written_in_order(stream: Any):
    steps, _, arranged = arrange(TWO_KEYS, operations(stream))
    place = {
        step.operation.id: (number, turn)
        for number, group in enumerate(arranged.groups)
        for row in group.rows
        for turn, step in enumerate(row.steps)
    }
    keyed = [s for s in steps if s.key is not None and s.operation.id in place]
    for index, earlier in enumerate(keyed):
        for later in keyed[index + 1 :]:
            one_key = earlier.key == later.key and earlier.value == later.value
            if earlier.key != later.key or (one_key and earlier.value is not Special.BAD):
                assert place[earlier.operation.id] < place[later.operation.id]


@given(streams)
def test_nothing_overtakes_a_held_operation_on_its_key(stream: Any):
    steps, _, arranged = arrange(TWO_KEYS, operations(stream))
    held = {v.operation_id for v in arranged.held}
    held |= {step.operation.id for step in steps if not step.operation.due}
    for index, earlier in enumerate(steps):
        if earlier.operation.id in held and not isinstance(earlier.value, Special | None):
            for later in steps[index + 1 :]:
                if (later.key, later.value) == (earlier.key, earlier.value):
                    assert later.operation.id in held


@given(streams)
def test_a_statement_touches_a_key_once_and_gives_one_set_of_columns(stream: Any):
    _, _, arranged = arrange(TWO_KEYS, operations(stream))
    for group in arranged.groups:
        values = [row.value for row in group.rows if not isinstance(row.value, Special | None)]
        assert len(values) == len(set(values))
        assert all(row.columns is group.columns for row in group.rows)
        assert len({row.first.key for row in group.rows}) == 1
        assert all(row.mode is group.mode for row in group.rows)


def sequentially(steps: Sequence[Step]) -> dict[Any, dict[str, Any]]:
    """One operation after the other, as an unhurried person would do it."""
    table: dict[Any, dict[str, Any]] = {}
    for step in steps:
        apply(table, step.value, json.loads(step.operation.data), step.operation.kind == "message")
    return table


def apply(table: dict[Any, dict[str, Any]], key: Any, data: dict[str, Any], message: bool) -> None:
    if key in table and not message:
        table[key] |= {name: value for name, value in data.items() if name != "id"}
    elif key not in table:
        table[key] = data


@given(streams)
def test_the_plan_does_what_one_operation_after_the_other_would_do(stream: Any):
    ops = [operation for operation in operations(stream) if operation.due]
    steps, _, arranged = arrange(ONE_KEY, ops)
    keyed = [step for step in steps if not isinstance(step.value, Special | None)]
    reader = Reader(ONE_KEY)
    table: dict[Any, dict[str, Any]] = {}
    for group in arranged.groups:
        for row in plan.by_key(group.rows):
            if not isinstance(row.value, Special | None):
                data = json.loads(plan.data(reader, row))
                apply(table, row.value, data, row.mode is Mode.MESSAGE)
    assert table == sequentially(keyed)


@given(streams)
def test_merged_rows_come_apart_into_what_they_were_made_of(stream: Any):
    _, _, arranged = arrange(ONE_KEY, operations(stream))
    for group in arranged.groups:
        apart = plan.unmerge(group.rows)
        whole = [s.operation.id for row in group.rows for s in row.steps]
        ids = [row.first.operation.id for rows in apart for row in rows]
        assert sorted(ids) == sorted(whole)
        for row in group.rows:
            own = [step.operation.id for step in row.steps]
            assert [number for number in ids if number in own] == own


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_parent_comes_first_unless_it_also_is_a_descendant(edges: list[tuple[int, int]]):
    parents: dict[int, set[int]] = {oid: {p for c, p in edges if c == oid} for oid in range(6)}
    tables = [
        Table(
            oid,
            "public",
            f"t{oid}",
            (),
            foreign_keys=tuple(
                ForeignKey(f"f{p}", ("x",), p, "public", f"t{p}", True) for p in parents[oid]
            ),
        )
        for oid in parents
    ]
    ordered = [table.oid for table in parents_first(tables, {oid: oid for oid in parents})]
    assert sorted(ordered) == sorted(parents)
    for child, parent in edges:
        if child != parent and child not in ancestors(parents, parent):
            assert ordered.index(parent) < ordered.index(child)


def ancestors(parents: dict[int, set[int]], oid: int) -> set[int]:
    found: set[int] = set()
    new = parents[oid] - {oid}
    while new:
        found |= new
        new = {p for o in new for p in parents[o] if p != o} - found
    return found


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0.001, 10), st.floats(10, 100))
def test_a_retry_never_waits_longer_than_the_cap_nor_much_less_than_due(
    attempt: int, chance: float, base: float, cap: float
):
    delay = backoff(attempt, base=base, cap=cap, random=lambda: chance)
    assert min(cap, base) / 2 <= delay <= cap
