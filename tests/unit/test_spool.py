"""The spool, clause by clause: what it accepts, keeps, gives out, forgets and counts."""

import fcntl
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helena_cli.batch import identity
from helena_cli.batch.flush import Outcome, Taken, Waiting
from helena_cli.batch.ledger import Flusher, FlushRecord
from helena_cli.batch.spool import CHUNK, MIB, Spool
from helena_cli.batch.spoolfile import SpoolFile
from helena_cli.batch.verdict import Verdict
from helena_cli.errors import ExitCode, InvalidOperation, SpoolFull, SpoolUnavailable
from tests.spools import Clock, assert_law, fill, ids, settle

BIG = 1 << 30


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.spool"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(path: Path, clock: Clock) -> Iterator[SpoolFile]:
    file = SpoolFile(path, durability="process", clock=clock)
    yield file
    file.close()


@pytest.fixture
def spool(file: SpoolFile, clock: Clock) -> Iterator[Spool]:
    spool = Spool(file, max_bytes=4096 * MIB, max_operation_bytes=8 * MIB, clock=clock)
    yield spool
    assert_law(spool)


# Accepting


def test_operation_is_read_back_as_it_was_given(spool):
    number = spool.append("update", "s.t", {"a": 1, "b": "ü"})
    (operation,) = spool.queued("s.t")
    assert (operation.id, operation.kind, operation.table) == (number, "update", "s.t")
    assert json.loads(operation.data) == {"a": 1, "b": "ü"}
    assert (operation.attempts, operation.held_since) == (0, None)


def test_id_is_the_time_of_acceptance_in_microseconds(spool, clock):
    assert spool.append("insert", "t", {"a": 1}) == int(clock.now * 1_000_000)


def test_ids_grow_while_the_clock_stands_still_or_goes_backwards(spool, clock):
    first = spool.append("insert", "t", {"a": 1})
    second = spool.append("insert", "u", {"a": 1})
    clock.now -= 86_400
    third = spool.append("insert", "t", {"a": 1})
    bulk = fill(spool, 3, "v")
    assert [first, second, third, *bulk] == list(range(first, first + 6))


def test_ids_grow_although_everything_was_settled_and_the_clock_went_backwards(spool, clock, path):
    last = fill(spool, 10)[-1]
    settle(spool, ids(spool))
    clock.now -= 86_400
    with_another = Spool.open(path, clock=clock)
    assert with_another.append("insert", "u", {"a": 1}) == last + 1
    with_another.close()


def test_ids_grow_although_all_was_buried_and_dropped_or_became_another_spool(spool, clock):
    buried = fill(spool, 2)
    spool.bury([Verdict(i, "23505", "duplicate") for i in buried])
    spool.drop(buried)
    clock.now -= 86_400
    last = spool.append("insert", "t", {"a": 1})
    assert last > max(buried)
    spool.renew_identity("a test")
    assert spool.append("insert", "u", {"a": 1}) > last


def test_ids_of_a_bulk_follow_its_order_over_all_tables(spool):
    numbers = spool.extend(("message", f"t{n % 3}", {"n": n}) for n in range(9))
    assert numbers == sorted(numbers)
    assert ids(spool, "t0") == numbers[0::3]
    assert [json.loads(o.data)["n"] for o in spool.queued("t1")] == [1, 4, 7]


def test_nothing_of_a_bulk_is_accepted_when_one_operation_is_bad(spool):
    with pytest.raises(InvalidOperation):
        spool.extend([("insert", "t", {"a": 1}), ("insert", "t", {"a": float("nan")})])
    assert spool.conservation().accepted == 0


def test_nothing_of_a_bulk_is_accepted_when_its_source_fails(spool):
    def source() -> Iterator[tuple[str, str, dict[str, int]]]:
        yield "insert", "t", {"a": 1}
        raise LookupError

    with pytest.raises(LookupError):
        spool.extend(source())
    assert spool.conservation().accepted == 0


@pytest.mark.parametrize("bad", [("insert", "t"), ("insert", "t", {"a": 1}, 4), None, 5])
def test_bulk_with_something_that_is_no_triple_is_refused(spool, bad):
    with pytest.raises(InvalidOperation) as caught:
        spool.extend([("insert", "t", {"a": 1}), bad])
    assert caught.value.field == "operation"
    assert spool.conservation().accepted == 0


def test_empty_bulk_is_nothing(spool):
    assert spool.extend([]) == []


def test_refused_operation_leaves_no_trace(spool):
    for bad in ({}, {"a": "\0"}, None):
        with pytest.raises(InvalidOperation):
            spool.append("insert", "new_table", bad)
    assert spool.lanes() == []
    assert spool.conservation().accepted == 0


def test_operation_over_the_limit_is_refused(path, clock):
    spool = Spool.open(path, max_operation_bytes=100, clock=clock)
    with pytest.raises(InvalidOperation):
        spool.append("insert", "t", {"a": "x" * 100})
    with pytest.raises(InvalidOperation):
        spool.extend([("insert", "t", {"a": "x" * 100})])
    spool.close()


def test_kinds_and_tables_are_counted_apart(spool):
    spool.extend([("insert", "t", {"a": 1}), ("update", "t", {"a": 1}), ("message", "u", {"a": 1})])
    spool.append("update", "u", {"a": 1})
    queue = spool.queue()
    assert (queue.insert, queue.update, queue.message, queue.total) == (1, 2, 1, 4)
    assert [(lane.table, lane.operations) for lane in spool.lanes()] == [("t", 2), ("u", 2)]


# The file


def test_file_and_all_beside_it_belong_to_the_user_alone(path):
    before = os.umask(0)
    try:
        spool = Spool.open(path)
        spool.append("insert", "t", {"a": 1})
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()}
    spool.close()
    suffixes = ("", "-wal", "-shm", ".gate", ".inbox")
    assert set(modes) == {f"test.spool{suffix}" for suffix in suffixes}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("power", 2)])
def test_durability_decides_when_sqlite_syncs(path, durability, synchronous):
    file = SpoolFile(path, durability=durability)
    assert file.read(lambda c: c.execute("PRAGMA synchronous").fetchone()) == (synchronous,)
    assert file.read(lambda c: c.execute("PRAGMA journal_mode").fetchone()) == ("wal",)
    file.close()


def test_accepted_operation_survives_kill_9(path):
    script = (
        "import os, signal, sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool;"
        "spool = Spool.open(Path(sys.argv[1]));"
        "print(spool.append('insert', 't', {'a': 1}), flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    answer = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert answer.returncode == -9, answer.stderr
    spool = Spool.open(path)
    assert ids(spool) == [int(answer.stdout)]
    spool.close()


def test_only_checkpoint_folds_the_log_into_the_file(spool, file, path):
    before = path.read_bytes()
    for _ in range(600):
        settle(spool, [spool.append("insert", "t", {"a": "x" * 2000})])
    # SQLite itself would have done it after a thousand pages.
    assert os.stat(f"{path}-wal").st_size > 2000 * 4096
    assert path.read_bytes() == before
    file.checkpoint(at_least=0)
    assert path.read_bytes() != before


def test_checkpoint_makes_the_log_usable_again(spool, file, path):
    sizes = []
    for _ in range(6):
        settle(spool, fill(spool, 500))
        file.checkpoint(at_least=0)
        sizes.append(os.stat(f"{path}-wal").st_size)
    assert sizes[-1] <= sizes[1]


def test_large_log_is_folded_and_a_small_one_left_alone(spool, path):
    spool.append("insert", "t", {"a": 1})
    before = path.read_bytes()
    spool.checkpoint()
    assert path.read_bytes() == before
    for _ in range(5):
        spool.append("insert", "t", {"a": "x" * 8_000_000})
    spool.fold()
    spool.checkpoint()
    assert path.stat().st_size > 30_000_000


def test_rest_of_the_log_is_folded_while_appenders_wait(file, path, monkeypatch):
    """Else a log that is written all the time could never start anew."""
    from helena_cli.batch import spoolfile

    gate_was_free: list[bool] = []

    def fold(_: sqlite3.Connection) -> bool:
        with open(f"{path}.gate", "rb") as gate:
            try:
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gate_was_free.append(True)
            except BlockingIOError:
                gate_was_free.append(False)
        return False

    monkeypatch.setattr(spoolfile, "_checkpoint", fold)
    file.checkpoint(at_least=0)
    assert gate_was_free == [True, False]


def test_log_stays_short_while_nothing_can_be_written(spool, path):
    log = Path(f"{path}-wal")
    for number in range(8):
        spool.append("insert", "t", {"a": "x" * 8_000_000})
        spool.fold()
        spool.beat(Flusher(number, "host", 1.0, 2.0))
    assert log.stat().st_size < 50_000_000
    spool.append("insert", "t", {"a": 1})
    spool.fold()
    assert log.stat().st_size < 33_000_000


def test_closed_spool_opens_again_when_it_is_used(spool):
    # A thread that outlived its engine must not lose what it was given.
    spool.close()
    number = spool.append("insert", "t", {"a": 1})
    assert ids(spool) == [number]


def test_relative_path_is_not_lost_when_the_process_changes_its_directory(state_dir, monkeypatch):
    monkeypatch.chdir(state_dir)
    spool = Spool.open(Path("test.spool"))
    monkeypatch.chdir("/")
    spool.append("insert", "t", {"a": 1})
    spool.close()
    assert spool.path == state_dir / "test.spool"
    reopened = Spool.open(state_dir / "test.spool")
    assert len(ids(reopened)) == 1
    reopened.close()


@pytest.mark.parametrize("name", ["with space", "per%20cent?x=1#y", "ünicode", "semi;colon'quote"])
def test_any_file_name_will_do(state_dir, name):
    folder = state_dir / name
    folder.mkdir()
    spool = Spool.open(folder / f"{name}.spool")
    spool.append("insert", "t", {"a": 1})
    spool.close()
    assert (folder / f"{name}.spool").stat().st_size


def test_missing_directory_is_a_clear_error(state_dir):
    with pytest.raises(SpoolUnavailable) as caught:
        Spool.open(state_dir / "absent" / "test.spool")
    assert "HELENA_STATE_DIR" in caught.value.remedy
    assert caught.value.exit_code is ExitCode.CONFIGURATION


def test_directory_in_place_of_the_file_is_a_clear_error(path):
    path.mkdir()
    with pytest.raises(SpoolUnavailable):
        Spool.open(path)


def test_file_of_a_newer_release_is_refused(path):
    Spool.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {identity.VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(SpoolUnavailable) as caught:
        Spool.open(path)
    assert "newer" in str(caught.value)
    assert path.read_bytes() == before


def test_bug_in_a_statement_looks_like_a_bug(file):
    with pytest.raises(sqlite3.ProgrammingError):
        file.transact(lambda c: c.execute("SELECT ?"))
    assert file.read(lambda c: c.execute("SELECT 1").fetchone()) == (1,)


def test_interrupted_transaction_is_taken_back(spool, file):
    def interrupted(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE counters SET written = written + 1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.transact(interrupted)
    assert spool.append("insert", "t", {"a": 1})
    assert spool.conservation().written == 0


# Room


def fill_until_full(
    spool: Spool, table: str, *, size: int = 4000, limit: int = 10_000
) -> SpoolFull:
    for _ in range(limit):
        try:
            spool.append("insert", table, {"a": "x" * size})
        except SpoolFull as error:
            return error
    raise AssertionError("it never became full")


@pytest.fixture
def small(path: Path, clock: Clock) -> Iterator[Spool]:
    spool = Spool.open(path, max_bytes=MIB, clock=clock)
    yield spool
    assert_law(spool)
    spool.close()


def test_one_table_may_fill_half_of_the_spool_and_the_others_go_on(small):
    error = fill_until_full(small, "stuck")
    assert "stuck" in str(error)
    assert "max_bytes" in error.remedy
    kept = len(ids(small, "stuck"))
    assert 0.45 * MIB < kept * 4000 < 0.55 * MIB
    assert small.append("insert", "other", {"a": 1})
    with pytest.raises(SpoolFull):
        small.append("insert", "stuck", {"a": "x" * 40_000})
    assert len(ids(small, "stuck")) == kept


def test_table_at_its_half_does_not_stop_another_process_from_queueing_for_others(small, path):
    fill_until_full(small, "stuck", size=1000)
    other = Spool.open(path, max_bytes=MIB)
    while True:
        # Between two measurements it may go a little beyond.
        try:
            other.append("insert", "stuck", {"a": "x" * 1000})
        except SpoolFull:
            break
    third = Spool.open(path, max_bytes=MIB)
    assert third.append("insert", "free", {"a": 1})
    assert third.extend([("insert", "free", {"a": 1})])
    with pytest.raises(SpoolFull):
        third.extend([("insert", "free", {"a": 1}), ("insert", "stuck", {"a": "x" * 40_000})])
    for spool in (other, third):
        spool.close()


def test_full_spool_accepts_nothing_and_loses_nothing(small):
    for table in ("a", "b", "c"):
        fill_until_full(small, table)
    error = fill_until_full(small, "d", limit=1)
    assert "full" in str(error)
    assert 0.9 * MIB < small.queue().spool_bytes < 1.1 * MIB
    before = small.conservation()
    with pytest.raises(SpoolFull):
        small.extend([("insert", "d", {"a": "x" * 4000})] * 10)
    assert small.conservation() == before
    assert ids(small, "d") == []


def test_room_is_usable_again_after_settling_although_the_file_does_not_shrink(small, path):
    for table in ("a", "b"):
        fill_until_full(small, table)
    for _ in range(3):
        for table in ("a", "b"):
            settle(small, ids(small, table), tables=[table])
        assert small.queue().spool_bytes < 0.3 * MIB
        for table in ("a", "b"):
            fill_until_full(small, table)
            assert ids(small, table)
    small.close()
    assert path.stat().st_size < 1.3 * MIB


def test_full_spool_can_still_be_flushed_buried_and_dropped(small):
    for table in ("a", "b", "c"):
        fill_until_full(small, table)
    dead, *rest = ids(small, "a")
    small.remember_nonce("n", ["a"])
    small.bury([Verdict(dead, "23505", "duplicate")])
    settle(small, rest[:3], coalesced=rest[3:5], held={rest[5]: 1.0}, tables=["a"])
    small.drop([dead])
    assert small.conservation().written == 3


def test_dead_letter_is_retried_in_a_full_spool_too_for_it_takes_no_more_room(small):
    number = small.append("insert", "a", {"a": "x" * 40_000})
    small.bury([Verdict(number, "23505", "duplicate")])
    for table in ("a", "b", "c"):
        fill_until_full(small, table)
    assert small.retry([number]) == 1
    assert small.dead_letters() == []


# Taking


def test_oldest_operations_of_all_tables_are_taken_first(spool):
    numbers = spool.extend(("insert", f"t{n % 7}", {"n": n}) for n in range(100))
    taken = spool.take(limit=10, max_bytes=BIG)
    assert [operation.id for operation in taken] == numbers[:10]
    assert [operation.table for operation in taken[:3]] == ["t0", "t1", "t2"]


def test_taking_removes_nothing(spool):
    fill(spool, 5)
    assert spool.take(limit=10, max_bytes=BIG) == spool.take(limit=10, max_bytes=BIG)


def test_batch_stays_within_its_bytes_but_is_never_empty(spool):
    spool.extend(("insert", "t", {"a": "x" * 1000}) for _ in range(10))
    assert len(spool.take(limit=100, max_bytes=3100)) == 3
    assert len(spool.take(limit=100, max_bytes=10)) == 1


def test_held_operations_come_along_and_say_whether_they_are_due(spool, clock):
    numbers = fill(spool, 6)
    settle(spool, held={numbers[4]: 10.0, numbers[1]: 20.0})
    taken = {o.id: o for o in spool.take(limit=2, max_bytes=BIG)}
    assert set(taken) == {numbers[0], numbers[1], numbers[2], numbers[4]}
    assert [taken[i].due for i in sorted(taken)] == [True, False, True, False]
    assert taken[numbers[1]].held_since == clock.now
    assert taken[numbers[1]].attempts == 1
    clock.now += 10
    taken = {o.id: o for o in spool.take(limit=2, max_bytes=BIG)}
    assert taken[numbers[4]].due
    assert not taken[numbers[1]].due


def test_time_of_the_first_hold_is_kept(spool, clock):
    (number,) = fill(spool, 1)
    settle(spool, held={number: 1.0})
    first = clock.now
    clock.now += 5
    settle(spool, held={number: 1.0})
    (operation,) = spool.take(limit=1, max_bytes=BIG)
    assert (operation.held_since, operation.attempts) == (first, 2)


def test_released_operations_are_due_at_once_and_others_untouched(spool):
    held, other, fresh = fill(spool, 3)
    settle(spool, held={held: 60.0, other: 60.0})
    spool.release_held([held, fresh, 12345])
    due = {o.id: o.due for o in spool.take(limit=10, max_bytes=BIG)}
    assert due == {held: True, other: False, fresh: True}


def test_waiting_lane_is_left_out_unless_it_is_asked_for(spool):
    fill(spool, 2, "stuck")
    flowing = fill(spool, 2, "t")
    spool.wait("stuck", Waiting("no such table", "42P01"), 5.0)
    assert [o.id for o in spool.take(limit=10, max_bytes=BIG)] == flowing
    assert {o.table for o in spool.take(limit=10, max_bytes=BIG, lane="stuck")} == {"stuck"}
    assert spool.take(limit=10, max_bytes=BIG, lane="unknown") == []


def take_after(spool: Spool, count: int, *, limit: int) -> Taken:
    """The first ones are taken and settled, and the next ones were read ahead meanwhile."""
    taken = Taken(tuple(spool.take(limit=count, max_bytes=BIG)))
    following = spool.read_ahead(taken, limit=limit, max_bytes=BIG)
    settle(spool, [o.id for o in taken.operations if o.held_since is None])
    assert following is not None
    return following


def test_what_was_read_ahead_is_not_read_again(spool):
    numbers = fill(spool, 10)
    ahead = take_after(spool, 4, limit=4)
    taken = spool.take(limit=5, max_bytes=BIG, ahead=ahead)
    assert [o.id for o in taken] == numbers[4:9]
    assert all(one is other for one, other in zip(taken, ahead.operations, strict=False))


def test_what_was_read_ahead_passes_over_what_is_put_back_further_on(spool):
    numbers = fill(spool, 10)
    settle(spool, held={numbers[7]: 10.0})
    ahead = take_after(spool, 4, limit=3)
    assert [o.id for o in ahead.operations] == [*numbers[4:7]]
    taken = spool.take(limit=3, max_bytes=BIG, ahead=ahead)
    assert [o.id for o in taken] == numbers[4:8]


def test_what_was_read_ahead_and_put_back_since_is_taken_as_it_is_now(spool, clock):
    numbers = fill(spool, 10)
    ahead = take_after(spool, 4, limit=3)
    settle(spool, held={numbers[5]: 10.0})
    taken = spool.take(limit=3, max_bytes=BIG, ahead=ahead)
    assert [o.id for o in taken] == numbers[4:8]
    assert [o.held_since for o in taken] == [None, clock.now, None, None]


def test_no_more_of_what_was_read_ahead_is_taken_than_fits(spool):
    numbers = fill(spool, 10)
    ahead = take_after(spool, 4, limit=6)
    assert [o.id for o in spool.take(limit=2, max_bytes=BIG, ahead=ahead)] == numbers[4:6]
    assert [o.id for o in spool.take(limit=6, max_bytes=20, ahead=ahead)] == numbers[4:6]


def test_lane_says_why_it_waits_since_when_and_how_often_it_was_tried(spool, clock):
    fill(spool, 2)
    since = clock.now
    spool.wait("t", Waiting("locked", "55P03", "wait"), 5.0)
    clock.now += 100
    spool.wait("t", Waiting("no such table", "42P01", "create it"), 7.0)
    (lane,) = spool.lanes()
    assert (lane.reason, lane.sqlstate, lane.remedy) == ("no such table", "42P01", "create it")
    assert (lane.since, lane.retry_at, lane.tries) == (since, clock.now + 7.0, 2)
    spool.resume("t")
    (lane,) = spool.lanes()
    assert (lane.reason, lane.since, lane.tries) == (None, None, 0)


def test_lane_without_operations_and_reason_is_not_listed(spool):
    settle(spool, fill(spool, 1))
    assert spool.lanes() == []


# Settling


def test_settled_operations_are_gone_and_counted(spool):
    numbers = fill(spool, 10)
    settle(spool, numbers[:3], coalesced=numbers[3:5], skipped=numbers[5:6])
    law = spool.conservation()
    assert (law.written, law.coalesced, law.spooled) == (4, 2, 4)
    assert ids(spool) == numbers[6:]


def test_settling_twice_counts_once(spool):
    numbers = fill(spool, 3)
    settle(spool, numbers)
    settle(spool, numbers, coalesced=numbers)
    assert spool.conservation().written == 3


def test_unknown_ids_are_settled_buried_and_released_without_effect(spool):
    (number,) = fill(spool, 1)
    settle(spool, [1, 2], coalesced=[3], held={4: 1.0})
    spool.bury([Verdict(5, "23505", "duplicate")])
    spool.release_held([6])
    assert spool.retry([7]) == spool.drop([8]) == 0
    assert ids(spool) == [number]


def test_settling_lets_the_lane_flow_again(spool):
    numbers = fill(spool, 2)
    spool.wait("t", Waiting("locked", "55P03"), 5.0)
    settle(spool, numbers[:1])
    assert [lane.reason for lane in spool.lanes()] == [None]


def test_no_transaction_deletes_more_than_a_chunk(spool, file):
    statements: list[str] = []
    file.read(lambda c: c.set_trace_callback(statements.append))
    numbers = fill(spool, 4 * CHUNK + 10)
    settle(spool, numbers[: CHUNK + 1], coalesced=numbers[CHUNK + 1 : 2 * CHUNK + 2])
    spool.bury([Verdict(i, "23505", "x") for i in numbers[2 * CHUNK + 2 : 3 * CHUNK + 4]])
    spool.expire_lane("t", "42P01", "gone")
    spool.drop([letter.id for letter in spool.dead_letters()])
    file.read(lambda c: c.set_trace_callback(None))
    # A statement is traced once for itself and again for each trigger: so as a set.
    transactions = "\n".join(statements).split("BEGIN IMMEDIATE")
    deletes = [set(re.findall(r"DELETE FROM.*(\[.*?\])", part)) for part in transactions]
    largest = max(sum(len(json.loads(found)) for found in part) for part in deletes)
    assert largest == CHUNK
    assert spool.queue().total == 0


# Nonces


def test_nonces_of_unfinished_flushes_are_known_until_one_succeeds(spool):
    numbers = fill(spool, 2)
    spool.fold()
    spool.remember_nonce("a", ["t"])
    spool.remember_nonce("b", ["t"])
    spool.remember_nonce("a", ["t"])
    spool.sync()
    assert spool.standing().known_nonces(["t", "u"]) == {
        "t": frozenset({"a", "b"}),
        "u": frozenset(),
    }
    spool.settle(
        Outcome("target", written=tuple(numbers[:1]), settled_tables=frozenset({"t"})), "b", {}
    )
    assert spool.standing().known_nonces(["t"]) == {"t": frozenset({"b"})}


def test_nonces_do_not_pile_up_and_the_last_are_kept(spool):
    fill(spool, 1)
    spool.fold()
    for number in range(100):
        spool.remember_nonce(f"n{number}", ["t"])
    known = spool.standing().known_nonces(["t"])["t"]
    assert {"n99", "n98", "n97"} <= known
    assert len(known) <= 20


# Dead letters


def test_dead_letter_keeps_the_operation_and_what_the_database_said(spool, clock):
    number = spool.append("update", "s.t", {"a": 1})
    spool.bury([Verdict(number, "23514", "violates check", "positive")])
    (letter,) = spool.dead_letters()
    assert (letter.id, letter.kind, letter.table) == (number, "update", "s.t")
    assert json.loads(letter.data) == {"a": 1}
    assert (letter.sqlstate, letter.message) == ("23514", "violates check")
    assert (letter.constraint, letter.attempts, letter.failed_at) == ("positive", 1, clock.now)
    assert ids(spool, "s.t") == []


def test_dead_letter_without_an_sqlstate_has_none(spool):
    (number,) = fill(spool, 1)
    spool.bury([Verdict(number, "", "gave up")])
    (letter,) = spool.dead_letters()
    assert letter.sqlstate is None


def test_dead_letters_are_found_by_id_by_table_or_all(spool):
    a, b, c = (spool.append("insert", table, {"a": 1}) for table in ("t", "u", "t"))
    spool.bury([Verdict(i, "23505", "duplicate") for i in (c, b, a)])
    assert [letter.id for letter in spool.dead_letters()] == [a, b, c]
    assert [letter.id for letter in spool.dead_letters(table="t")] == [a, c]
    assert [letter.id for letter in spool.dead_letters([b, 5])] == [b]
    assert [letter.id for letter in spool.dead_letters([a, b], table="u")] == [b]
    assert spool.dead_letters([]) == []


def test_retried_dead_letters_go_to_the_end_of_the_queue_in_their_order(spool):
    numbers = fill(spool, 4)
    spool.bury([Verdict(i, "23505", "duplicate") for i in numbers[:2]])
    assert spool.retry([numbers[1], numbers[0]]) == 2
    waiting = list(spool.queued("t"))
    assert [json.loads(o.data)["n"] for o in waiting] == [2, 3, 0, 1]
    assert waiting[-2].id > numbers[-1]
    law = spool.conservation()
    assert (law.accepted, law.dead, law.spooled) == (4, 0, 4)


def test_retry_and_drop_do_each_dead_letter_once(spool):
    numbers = fill(spool, 2 * CHUNK + 1)
    spool.bury([Verdict(i, "23505", "duplicate") for i in numbers])
    assert spool.retry(numbers[:10] * 2) == 10
    assert spool.drop(numbers) == 2 * CHUNK + 1 - 10
    law = spool.conservation()
    assert (law.dropped, law.spooled, law.dead) == (2 * CHUNK - 9, 10, 0)


def test_expired_lane_becomes_dead_letters_and_flows_again(spool):
    numbers = fill(spool, CHUNK + 3)
    other = fill(spool, 1, "u")
    settle(spool, held={numbers[0]: 60.0})
    spool.wait("t", Waiting("no such table", "42P01"), 5.0)
    assert spool.expire_lane("t", "42P01", "no such table") == CHUNK + 3
    letters = spool.dead_letters()
    assert [letter.id for letter in letters] == numbers
    assert {letter.sqlstate for letter in letters} == {"42P01"}
    assert [(lane.table, lane.reason) for lane in spool.lanes()] == [("u", None)]
    assert ids(spool, "u") == other


# Looking


def test_pressure_counts_what_could_be_written_now(spool, clock):
    assert (spool.pressure().count, spool.pressure().oldest_age) == (0, None)
    numbers = fill(spool, 5)
    fill(spool, 5, "stuck")
    spool.wait("stuck", Waiting("locked", "55P03"), 5.0)
    settle(spool, held={numbers[0]: 10.0, numbers[1]: 20.0})
    clock.now += 2
    pressure = spool.pressure()
    assert (pressure.count, pressure.urgent) == (3, False)
    assert pressure.oldest_age == pytest.approx(2.0, abs=0.001)
    clock.now += 8
    assert (spool.pressure().count, spool.pressure().urgent) == (4, True)


def test_pressure_is_urgent_while_somebody_waits_for_what_is_queued(spool):
    numbers = fill(spool, 2)
    assert not spool.pressure().urgent
    through = spool.request_flush()
    assert through == numbers[-1]
    assert spool.pressure().urgent
    late = fill(spool, 1)
    settle(spool, numbers)
    assert spool.is_settled(through)
    assert not spool.pressure().urgent
    assert ids(spool) == late


def test_flush_requested_of_an_empty_spool_is_settled_at_once(spool):
    assert spool.is_settled(spool.request_flush())
    settle(spool, fill(spool, 1))
    assert spool.is_settled(spool.request_flush())
    fill(spool, 1)
    assert not spool.pressure().urgent


def test_held_dead_and_waiting_operations_do_not_keep_a_flush_open(spool):
    held, dead, written = fill(spool, 3)
    fill(spool, 2, "stuck")
    through = spool.request_flush()
    settle(spool, held={held: 60.0})
    spool.bury([Verdict(dead, "23505", "duplicate")])
    assert not spool.is_settled(through)
    settle(spool, [written])
    assert not spool.is_settled(through)
    spool.wait("stuck", Waiting("locked", "55P03"), 5.0)
    assert spool.is_settled(through)


def test_what_waits_and_is_to_be_tried_at_once_keeps_a_flush_open_until_it_was(spool, clock):
    (held,) = fill(spool, 1)
    fill(spool, 1, "stuck")
    settle(spool, held={held: 60.0})
    spool.wait("stuck", Waiting("locked", "55P03"), 5.0)
    since = spool.lanes()[0].since
    through = spool.request_flush()
    clock.now += 1
    spool.hurry()
    assert [o.due for o in spool.take(limit=10, max_bytes=BIG)] == [True]
    spool.wait("stuck", Waiting("locked", "55P03"), 5.0)
    assert not spool.is_settled(through)
    settle(spool, held={held: 60.0})
    assert spool.is_settled(through)
    spool.hurry()
    settle(spool, held={held: 60.0})
    assert not spool.is_settled(through)
    spool.wait("stuck", Waiting("locked", "55P03"), 5.0)
    assert spool.is_settled(through)
    assert (spool.lanes()[0].since, spool.lanes()[0].tries) == (since, 3)


def test_parents_table_has_unsettled_operations_unless_they_are_merely_held(spool):
    assert not spool.has_unsettled("t")
    first, second = fill(spool, 2)
    assert spool.has_unsettled("t")
    assert not spool.has_unsettled("u")
    settle(spool, [first], held={second: 60.0})
    assert not spool.has_unsettled("t")


def test_queue_tells_the_age_of_the_oldest(spool, clock):
    assert spool.queue().oldest_seconds is None
    fill(spool, 1)
    clock.now += 7
    fill(spool, 1, "u")
    assert spool.queue().oldest_seconds == pytest.approx(7.0, abs=0.001)
    clock.now -= 100
    assert spool.queue().oldest_seconds == 0.0


def test_lane_is_read_in_order_and_in_pieces_while_it_changes(spool):
    numbers = fill(spool, 2 * CHUNK + 5)
    seen = []
    for operation in spool.queued("t"):
        seen.append(operation.id)
        if len(seen) == 1:
            settle(spool, numbers[CHUNK : CHUNK + 10])
    assert seen == numbers[:CHUNK] + numbers[CHUNK + 10 :]


def test_flushes_are_summed_up(spool, clock):
    assert spool.flushes().last is None
    assert spool.flushes().p50_ms is None
    for number in range(100):
        spool.record(FlushRecord(clock.now + number, 10, 8, (number + 1) / 1000))
    spool.record(FlushRecord(clock.now + 100, 0, 0, 9.0, "no answer"))
    flushes = spool.flushes()
    assert (flushes.count, flushes.operations, flushes.rows, flushes.failures) == (
        100,
        1000,
        800,
        1,
    )
    assert (flushes.p50_ms, flushes.p99_ms) == (pytest.approx(50.0), pytest.approx(99.0))
    assert flushes.operations_per_second == pytest.approx(1000 / 5.05)
    assert flushes.last == FlushRecord(clock.now + 100, 0, 0, 9.0, "no answer")


def test_old_flushes_are_forgotten_one_by_one_but_stay_counted(spool, file, clock):
    for _ in range(250):
        spool.record(FlushRecord(clock.now, 1, 1, 0.001))
    assert spool.flushes().count == 250
    (kept,) = file.read(lambda c: c.execute("SELECT count(*) FROM flushes").fetchone())
    assert kept == 200


def test_last_sign_of_life_of_the_flusher_is_kept(spool):
    assert spool.flusher() is None
    spool.beat(Flusher(1, "a", 1.0, 2.0))
    spool.beat(Flusher(2, "b", 3.0, 4.0))
    assert spool.flusher() == Flusher(2, "b", 3.0, 4.0)


def test_target_is_learnt_and_kept(spool, path):
    assert spool.target_id is None
    spool.learn_target("one")
    other = Spool.open(path)
    assert other.target_id == "one"
    assert other.id == spool.id
    other.close()


# Identity


def test_ids_grow_over_a_lost_log(path):
    """The log is lost with the machine; the file alone comes back."""
    spool = Spool.open(path)
    settle(spool, fill(spool, 3))
    spool.close()
    before = path.read_bytes()
    spool = Spool.open(path)
    lost = fill(spool, 5)
    spool.close()
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(before)
    spool = Spool.open(path)
    assert spool.queue().total == 0
    assert spool.append("insert", "t", {"a": 1}) > lost[-1]
    assert_law(spool)
    spool.close()


def test_ids_grow_over_a_new_file(path):
    spool = Spool.open(path)
    last, identity = fill(spool, 5)[-1], spool.id
    spool.close()
    for file in path.parent.iterdir():
        file.unlink()
    spool = Spool.open(path)
    assert spool.id != identity
    assert spool.append("insert", "t", {"a": 1}) > last
    spool.close()


def assert_became_another(spool: Spool, before: dict[str, Any], word: str) -> None:
    assert spool.id != before["id"]
    assert spool.target_id is None
    assert spool.queue().total == 0
    assert [letter.id for letter in spool.dead_letters()] == before["ids"]
    assert all(word in letter.message for letter in spool.dead_letters())
    assert spool.standing().known_nonces(["t"]) == {"t": frozenset()}
    assert spool.lanes() == []
    assert spool.append("insert", "t", {"a": 1}) > before["ids"][-1]
    assert_law(spool)


@pytest.fixture
def original(path: Path, clock: Clock) -> dict[str, Any]:
    """What is known of a closed spool at `path`."""
    spool = Spool.open(path, clock=clock)
    spool.learn_target("target")
    numbers = fill(spool, 3)
    spool.remember_nonce("n", ["t"])
    spool.wait("t", Waiting("locked", "55P03"), 5.0)
    before = {"id": spool.id, "ids": numbers}
    spool.close()
    return before


def test_reopened_spool_is_the_same(path, original):
    spool = Spool.open(path)
    assert (spool.id, spool.target_id, ids(spool)) == (original["id"], "target", original["ids"])
    spool.close()


def test_spool_under_another_name_is_another_spool(path, original, clock):
    moved = path.rename(path.with_name("moved.spool"))
    spool = Spool.open(moved, clock=clock)
    assert_became_another(spool, original, str(path))
    spool.close()


def test_copied_spool_is_another_and_the_original_goes_on(path, original, clock):
    copy = path.with_name("copy.spool")
    copy.write_bytes(path.read_bytes())
    spool = Spool.open(copy, clock=clock)
    assert_became_another(spool, original, "copied")
    spool.close()
    spool = Spool.open(path, clock=clock)
    assert (spool.id, ids(spool)) == (original["id"], original["ids"])
    spool.close()


def test_spool_restored_under_another_inode_is_another(path, original, clock):
    restored = path.with_name("restored")
    restored.write_bytes(path.read_bytes())
    restored.replace(path)
    spool = Spool.open(path, clock=clock)
    assert_became_another(spool, original, "copied")
    spool.close()


def test_spool_on_another_machine_is_another(path, original, clock, monkeypatch):
    from helena_cli.batch import identity

    monkeypatch.setattr(identity, "machine", lambda: "another")
    spool = Spool.open(path, clock=clock)
    assert_became_another(spool, original, "copied")
    spool.close()


def test_changed_host_name_does_not_make_another_spool(path, original, clock, monkeypatch):
    import platform

    monkeypatch.setattr(platform, "node", lambda: "changed.example")
    spool = Spool.open(path, clock=clock)
    assert spool.id == original["id"]
    spool.close()


def test_spool_becomes_another_on_demand(spool):
    before = {"id": spool.id, "ids": fill(spool, 3)}
    spool.learn_target("target")
    spool.renew_identity("its position is unknown to the database")
    assert_became_another(spool, before, "its position is unknown to the database")
    assert spool.retry(before["ids"]) == 3
