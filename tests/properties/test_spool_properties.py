"""The spool against a model of it: whatever is done in whatever order, by two processes' worth of
spools on one file, every operation is in exactly one place and the law holds.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Struct

from helena_cli.batch.flush import Outcome, Taken, Waiting
from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.operation import encode
from helena_cli.batch.spool import MIB, Spool
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import InvalidOperation
from tests.spools import Clock, assert_law, settle

TABLES = ("t", "u", "s.v")
tables = st.sampled_from(TABLES)
kinds = st.sampled_from(("insert", "update", "message"))
texts = st.text('xü"', max_size=5)
values = st.dictionaries(st.sampled_from("abc"), st.integers() | texts, min_size=1)
triples = st.tuples(kinds, tables, values)
which = st.integers(0, 1)
#: Which of the operations that are there: a choice by position, folded onto what there is.
choices = st.lists(st.integers(0, 30), max_size=6)


class Known(Struct):
    """An operation as the model knows it."""

    kind: str
    table: str
    data: bytes
    attempts: int = 0
    held_since: float | None = None
    retry_at: float = 0.0


class SpoolModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.clock = Clock()
        self.queued: dict[int, Known] = {}
        self.dead: dict[int, Known] = {}
        self.waiting: dict[str, str] = {}
        self.written = self.coalesced = self.dropped = self.accepted = 0
        self.last_id = 0
        self.ahead: Taken | None = None
        self.through: int | None = None

    @initialize()
    def open(self) -> None:
        self.spools = [self.open_one(), self.open_one()]
        self.identity = self.spools[0].id

    def open_one(self) -> Spool:
        return Spool.open(self.folder / "test.spool", clock=self.clock)

    def teardown(self) -> None:
        for spool in getattr(self, "spools", []):
            spool.close()
        shutil.rmtree(self.folder)

    # What the model expects

    def pick(self, numbers: dict[int, Any], chosen: list[int]) -> list[int]:
        """Some of these ids, and one that nobody knows."""
        there = sorted(numbers)
        return [there[n % len(there)] if there else 1 for n in chosen] + [7]

    def lane(self, table: str) -> dict[int, Known]:
        return {i: o for i, o in sorted(self.queued.items()) if o.table == table}

    def flowing(self) -> dict[int, Known]:
        return {i: o for i, o in sorted(self.queued.items()) if o.table not in self.waiting}

    def due(self, known: Known) -> bool:
        return known.held_since is None or known.retry_at <= self.clock.now

    def accept(self, numbers: list[int], given: list[tuple[str, str, Any]]) -> None:
        for number, (kind, table, data) in zip(numbers, given, strict=True):
            assert number > self.last_id
            self.last_id = number
            self.queued[number] = Known(kind, table, data)

    # Accepting

    @rule(n=which, triple=triples)
    def append(self, n: int, triple: tuple[str, str, Any]) -> None:
        number = self.spools[n].append(*triple)
        (operation,) = [o for o in self.spools[n].queued(triple[1]) if o.id == number]
        self.accept([number], [(triple[0], triple[1], operation.data)])
        self.accepted += 1

    @rule(n=which, given=st.lists(triples, max_size=8))
    def extend(self, n: int, given: list[tuple[str, str, Any]]) -> None:
        numbers = self.spools[n].extend(given)
        there = {o.id: o.data for table in TABLES for o in self.spools[1 - n].queued(table)}
        kept = [(kind, table, there[i]) for i, (kind, table, _) in zip(numbers, given, strict=True)]
        self.accept(numbers, kept)
        self.accepted += len(given)

    @rule(n=which, given=st.lists(triples, max_size=3), bad=st.sampled_from(({}, {"a": "\0"}, 5)))
    def extend_with_a_bad_one(self, n: int, given: list[Any], bad: Any) -> None:
        with pytest.raises(InvalidOperation):
            self.spools[n].extend([*given, ("insert", "t", bad)])

    @rule(seconds=st.floats(-50.0, 50.0))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(n=which)
    def reopen(self, n: int) -> None:
        self.spools[n].close()
        self.spools[n] = self.open_one()

    # Flushing

    @rule(n=which, limit=st.integers(1, 10), room=st.sampled_from((1, 30, MIB)))
    def take(self, n: int, limit: int, room: int) -> None:
        expected: list[int] = []
        used = 0
        for number, known in self.flowing().items():
            if known.held_since is None:
                used += len(known.data)
                if expected and (used > room or len(expected) >= limit):
                    break
                expected.append(number)
        expected += [i for i, known in self.flowing().items() if known.held_since is not None]
        taken = self.spools[n].take(limit=limit, max_bytes=room, ahead=self.ahead)
        # Whatever happens before the next one, it is worth as much as reading anew.
        given = Taken(tuple(taken))
        self.ahead = self.spools[1 - n].read_ahead(given, limit=limit, max_bytes=room)
        assert [operation.id for operation in taken] == sorted(expected)
        for operation in taken:
            known = self.queued[operation.id]
            assert (operation.kind, operation.table) == (known.kind, known.table)
            assert (operation.data, operation.attempts) == (known.data, known.attempts)
            assert operation.held_since == known.held_since
            assert operation.due == self.due(known)

    @rule(n=which, table=tables)
    def take_a_lane(self, n: int, table: str) -> None:
        taken = self.spools[n].take(limit=1000, max_bytes=MIB, lane=table)
        assert [operation.id for operation in taken] == list(self.lane(table))

    @rule(n=which, written=choices, coalesced=choices, held=choices, delay=st.floats(0.0, 60.0))
    def settle(
        self, n: int, written: list[int], coalesced: list[int], held: list[int], delay: float
    ) -> None:
        gone = self.pick(self.queued, written)
        merged = [i for i in self.pick(self.queued, coalesced) if i not in gone]
        back = [i for i in self.pick(self.queued, held) if i not in gone and i not in merged]
        moved = {known.table for i, known in self.queued.items() if i in {*gone, *merged, *back}}
        settle(
            self.spools[n],
            gone,
            coalesced=merged,
            held=dict.fromkeys(back, delay),
            tables=moved,
        )
        self.written += len([self.queued.pop(i) for i in set(gone) if i in self.queued])
        self.coalesced += len([self.queued.pop(i) for i in set(merged) if i in self.queued])
        for number in set(back) & self.queued.keys():
            known = self.queued[number]
            known.attempts += 1
            known.retry_at = self.clock.now + delay
            if known.held_since is None:
                known.held_since = self.clock.now
        for table in moved:
            self.waiting.pop(table, None)

    @rule(
        n=which,
        given=st.lists(triples, min_size=1, max_size=8),
        limit=st.integers(1, 10),
        meddle=st.booleans(),
    )
    def write_straight(self, n: int, given: list[Any], limit: int, meddle: bool) -> None:
        busy = {known.table for known in self.queued.values()} | self.waiting.keys()
        spool = self.spools[n]
        numbers = spool.extend(given)
        encoded = [(kind, t, encode(kind, t, data, max_bytes=MIB)) for kind, t, data in given]
        self.accept(numbers, encoded)
        self.accepted += len(given)
        taken = spool.straight(limit=limit, max_bytes=MIB)
        if not busy.isdisjoint(table for _, table, _ in given[:limit]):
            assert taken is None
            return
        assert taken is not None
        assert [(o.kind, o.table, o.data) for o in taken.operations] == encoded[:limit]
        assert taken.more == (len(given) > limit)
        following = spool.read_ahead(taken, limit=limit, max_bytes=MIB)
        if meddle:
            # Somebody looks at what is queued, so it is in the tables now.
            self.spools[1 - n].fold()
        gone = tuple(o.id for o in taken.operations)
        outcome = Outcome("target", written=gone[:1], skipped=gone[1:])
        flush = FlushRecord(0.0, len(gone), len(gone), 0.1)
        assert spool.settle_straight(taken, outcome, "n", flush, []) == (not meddle)
        if meddle:
            settle(spool, gone, tables=())
        assert [self.queued.pop(number).table for number in gone]
        self.written += len(gone)
        if not meddle and busy.isdisjoint(table for _, table, _ in given):
            assert spool.straight(following, limit=limit, max_bytes=MIB) == spool.straight(
                limit=limit, max_bytes=MIB
            )

    @rule(n=which, chosen=choices)
    def release_held(self, n: int, chosen: list[int]) -> None:
        numbers = self.pick(self.queued, chosen)
        self.spools[n].release_held(numbers)
        for number in set(numbers) & self.queued.keys():
            self.queued[number].retry_at = 0.0

    @rule(n=which, chosen=choices)
    def bury(self, n: int, chosen: list[int]) -> None:
        numbers = self.pick(self.queued, chosen)
        self.spools[n].bury([Verdict(i, "23505", "duplicate") for i in numbers])
        self.die(set(numbers) & self.queued.keys(), attempt=1)

    def die(self, numbers: set[int], *, attempt: int) -> None:
        for number in numbers:
            known = self.queued.pop(number)
            known.attempts += attempt
            self.dead[number] = known

    @rule(n=which, table=tables, reason=st.sampled_from(("locked", "no such table")))
    def wait(self, n: int, table: str, reason: str) -> None:
        self.spools[n].wait(table, Waiting(reason, "42P01"), 5.0)
        if any(known.table == table for known in (*self.queued.values(), *self.dead.values())):
            self.waiting[table] = reason
        else:
            # Only a table that something was ever queued for has a lane.
            self.spools[n].resume(table)
            self.waiting.pop(table, None)

    @rule(n=which, table=tables)
    def resume(self, n: int, table: str) -> None:
        self.spools[n].resume(table)
        self.waiting.pop(table, None)

    @rule(n=which, table=tables)
    def expire_lane(self, n: int, table: str) -> None:
        numbers = set(self.lane(table))
        assert self.spools[n].expire_lane(table, "42P01", "gone") == len(numbers)
        self.die(numbers, attempt=1)
        self.waiting.pop(table, None)

    @precondition(lambda self: len(self.queued) > 5)
    @rule(n=which)
    def renew_identity(self, n: int) -> None:
        self.spools[n].renew_identity("a test")
        assert self.spools[1 - n].id != self.identity
        self.identity = self.spools[n].id
        self.die(set(self.queued), attempt=0)
        self.waiting.clear()

    # Dead letters

    @rule(n=which, chosen=choices)
    def retry(self, n: int, chosen: list[int]) -> None:
        numbers = self.pick(self.dead, chosen)
        back = sorted(set(numbers) & self.dead.keys())
        assert self.spools[n].retry(numbers) == len(back)
        new = sorted(o.id for t in TABLES for o in self.spools[n].queued(t) if o.id > self.last_id)
        known = [self.dead.pop(number) for number in back]
        self.accept(new, [(k.kind, k.table, k.data) for k in known])

    @rule(n=which, chosen=choices)
    def drop(self, n: int, chosen: list[int]) -> None:
        numbers = self.pick(self.dead, chosen)
        gone = set(numbers) & self.dead.keys()
        assert self.spools[n].drop(numbers) == len(gone)
        for number in gone:
            del self.dead[number]
        self.dropped += len(gone)

    # Looking

    @rule(n=which)
    def request_flush(self, n: int) -> None:
        self.through = self.spools[n].request_flush()
        assert self.through >= self.last_id

    @invariant()
    def everything_is_where_the_model_has_it(self) -> None:
        for spool in getattr(self, "spools", []):
            assert_law(spool)
            law = spool.conservation()
            assert law.accepted == self.accepted
            assert (law.written, law.coalesced) == (self.written, self.coalesced)
            assert law.dropped == self.dropped
            for table in TABLES:
                assert [o.id for o in spool.queued(table)] == list(self.lane(table))
            assert [letter.id for letter in spool.dead_letters()] == sorted(self.dead)

    @invariant()
    def lanes_and_pressure_are_as_the_model_says(self) -> None:
        for spool in getattr(self, "spools", []):
            assert {o.table: o.reason for o in spool.lanes() if o.reason} == self.waiting
            writable = {i: known for i, known in self.flowing().items() if self.due(known)}
            fresh = [i for i, known in self.flowing().items() if known.held_since is None]
            pressure = spool.pressure()
            assert pressure.count == len(writable)
            assert (pressure.oldest_age is None) == (not fresh)
            asked = self.through is not None and bool(fresh) and fresh[0] <= self.through
            assert pressure.urgent == (asked or any(k.held_since for k in writable.values()))
            if self.through is not None:
                assert spool.is_settled(self.through) == (not asked)
            for table in TABLES:
                fresh_ones = [k for k in self.lane(table).values() if k.held_since is None]
                assert spool.has_unsettled(table) == bool(fresh_ones)


TestSpool = SpoolModel.TestCase
TestSpool.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
