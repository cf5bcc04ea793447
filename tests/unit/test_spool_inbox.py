"""The inbox of a spool when it is damaged, lost, moved or left by another spool."""

import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from helena_cli.batch import fold, spoolfile
from helena_cli.batch import inbox as module
from helena_cli.batch.flush import Outcome
from helena_cli.batch.inbox import PAGE
from helena_cli.batch.ledger import FlushRecord
from helena_cli.batch.record import HEAD, Row
from helena_cli.batch.spool import Spool
from helena_cli.errors import InvalidOperation
from tests.spools import Clock, assert_law, fill, ids, settle

MIB = 1 << 20


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.spool"


@pytest.fixture
def inbox(path: Path) -> Path:
    return Path(f"{path}.inbox")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(path: Path, clock: Clock) -> Iterator[Spool]:
    spool = Spool.open(path, clock=clock)
    yield spool
    assert_law(spool)
    spool.close()


def write(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_what_was_read_while_the_inbox_was_filled_anew_is_read_again(spool):
    old = spool.append("insert", "t", {"a": 0})
    (remains,) = spool.straight(limit=10, max_bytes=1000).operations
    spool.fold()
    settle(spool, [old])
    new = [spool.append("insert", "t", {"a": n}) for n in range(3)]
    found = spool.straight(limit=10, max_bytes=1000)
    first, _, last = found.operations
    mixed = replace(found, operations=(first, remains, last))
    again = spool.straight(mixed, limit=10, max_bytes=1000)
    assert [operation.id for operation in again.operations] == new


@pytest.mark.parametrize("length", [PAGE, PAGE + 1, PAGE + 100, PAGE + 5000])
def test_inbox_that_lost_its_end_gives_what_is_left(spool, inbox, length):
    """After a power cut the length of a file may be older than what the file says."""
    for _ in range(100):
        spool.append("insert", "t", {"a": "x" * 60})
    size = (inbox.stat().st_size - PAGE) // 100
    os.truncate(inbox, length)
    assert spool.lost() > 0
    assert len(ids(spool)) == (length - PAGE) // size
    later = spool.append("insert", "t", {"a": 1})
    assert ids(spool)[-1] == later


def test_damage_in_the_midst_of_the_inbox_costs_no_more_than_what_follows(spool, inbox):
    for _ in range(100):
        spool.append("insert", "t", {"a": "x" * 60})
    write(inbox, PAGE + 5000, b"\xff" * 200)
    assert 0 < len(ids(spool)) < 100
    assert spool.lost() > 0


@pytest.mark.parametrize("page", [bytes(PAGE), random.Random(1).randbytes(PAGE)])
def test_inbox_whose_page_of_numbers_is_lost_begins_anew(spool, path, inbox, clock, page):
    last = fill(spool, 3)[-1]
    assert ids(spool)[-1] == last
    spool.append("insert", "t", {"a": 1})
    spool._file._let_go()
    write(inbox, 0, page)
    clock.now -= 86_400
    other = Spool.open(path, clock=clock)
    later = other.append("insert", "t", {"a": 1})
    assert later == last + 1
    assert ids(other)[-1] == later
    assert other.append("insert", "t", {"a": 1}) == later + 1
    other.close()


def test_operation_is_not_taken_for_an_old_one_when_the_inbox_was_deleted(spool, inbox, clock):
    last = fill(spool, 3)[-1]
    assert ids(spool)[-1] == last
    inbox.unlink()
    clock.now -= 86_400
    later = spool.append("insert", "t", {"a": 1})
    assert later > last
    assert ids(spool)[-1] == later


def test_operations_go_to_the_place_of_the_spool_although_its_files_were_moved(spool, path, clock):
    fill(spool, 3)
    ids(spool)
    aside = path.parent / "aside"
    aside.mkdir()
    for file in path.parent.glob("test.spool*"):
        file.rename(aside / file.name)
    number = spool.append("insert", "t", {"a": 1})
    other = Spool.open(path, clock=clock)
    assert ids(other) == [number] == ids(spool)
    other.close()


def test_spool_that_became_another_accepts_operations_for_itself(spool):
    fill(spool, 3)
    spool.renew_identity("a test")
    number = spool.append("insert", "t", {"a": 1})
    assert ids(spool) == [number]
    assert len(spool.dead_letters()) == 3


def test_moved_spool_accepts_operations_for_itself(spool, path, clock):
    fill(spool, 3)
    spool.close()
    for file in path.parent.glob("test.spool*"):
        file.rename(file.with_name(file.name.replace("test", "moved")))
    moved = Spool.open(path.with_name("moved.spool"), clock=clock)
    number = moved.append("insert", "t", {"a": 1})
    assert ids(moved) == [number]
    assert len(moved.dead_letters()) == 3
    assert_law(moved)
    moved.close()


def test_spool_beside_the_inbox_of_another_keeps_its_operations_as_dead_letters(spool, path, clock):
    fill(spool, 2)
    spool._file._let_go()
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    other = Spool.open(path, clock=clock)
    assert len(other.dead_letters()) == 2
    number = other.append("insert", "t", {"a": 1})
    assert ids(other) == [number]
    assert_law(other)
    other.close()


def test_settling_does_not_wait_for_what_was_accepted_later(spool):
    numbers = fill(spool, 3)
    taken = spool.take(limit=10, max_bytes=1 << 20)
    later = spool.append("insert", "t", {"a": 1})
    settle(spool, [operation.id for operation in taken])
    assert ids(spool) == [later]
    assert later > numbers[-1]


def test_what_is_in_the_inbox_and_in_the_tables_is_counted_together(spool, clock):
    first = fill(spool, 2)
    spool.fold()
    clock.now += 10
    spool.append("update", "t", {"n": 1})
    spool.append("message", "other", {"n": 1})
    found = spool.queue()
    assert (found.insert, found.update, found.message, found.total) == (2, 1, 1, 4)
    assert found.oldest_seconds == pytest.approx(10, abs=0.001)
    assert [(lane.table, lane.operations) for lane in spool.lanes()] == [("other", 1), ("t", 3)]
    settle(spool, first)
    fill(spool, 1)
    assert spool.queue().total == 3
    assert_law(spool)
    assert spool.conservation().accepted == 5


def test_the_oldest_one_may_be_in_the_inbox(spool, clock):
    fill(spool, 1)
    clock.now += 7
    fill(spool, 1)
    assert spool.queue().oldest_seconds == pytest.approx(7, abs=0.001)


def test_many_records_of_all_sizes_are_counted_without_the_data(spool, monkeypatch):
    monkeypatch.setattr(module, "SLICE", 5000)
    numbers = spool.extend(
        ("insert", f"table {n % 7}", {"a": "x" * (n * n % 9000)}) for n in range(500)
    )
    with monkeypatch.context() as patch:
        patch.setattr(fold, "insert", None)
        assert spool.queue().total == len(numbers)
        assert {lane.operations for lane in spool.lanes()} == {71, 72}


def test_what_died_between_commit_and_release_is_counted_once(spool, monkeypatch):
    fill(spool, 5)
    with monkeypatch.context() as patch:
        patch.setattr(module.Inbox, "release", lambda *_: None)
        spool.fold()
    fill(spool, 2)
    assert spool._file.fresh_bytes() > 0
    assert spool.queue().total == 7
    assert spool.conservation().accepted == 7


def test_bytes_in_the_inbox_are_bytes_of_the_spool(spool):
    before = spool.queue().spool_bytes
    spool.append("insert", "t", {"a": "x" * 50_000})
    assert 50_000 < spool.queue().spool_bytes - before < 51_000


@pytest.mark.parametrize(
    ("record", "offset"),
    [(1, 12), (2, 18), (1, 19)],
    ids=["no such kind", "more data than there are", "a name that is no text"],
)
def test_what_is_damaged_is_not_counted_but_brought_into_the_tables(spool, inbox, record, offset):
    numbers = fill(spool, 3)
    one = spool._file.fresh_bytes() // 3
    write(inbox, PAGE + record * one + offset, b"\xff")
    assert sum(lane.operations for lane in spool.lanes()) == record
    assert spool.queue().total == record
    assert ids(spool) == numbers[:record]
    assert spool.lost() == 1


def test_zeros_are_no_records(spool, inbox):
    numbers = [spool.append("insert", "t", {"a": 10**11 + n}) for n in range(3)]
    one = spool._file.fresh_bytes() // 3
    # As many heads of nothing but zeros as one record takes.
    assert one == 2 * HEAD
    write(inbox, PAGE + one, bytes(one))
    assert spool.queue().total == 1
    assert ids(spool) == numbers[:1]
    assert spool.lost() == 1


def test_operations_of_another_spool_are_not_counted_as_queued(spool):
    fill(spool, 3)
    spool._file._inbox.belong_to("another")
    assert spool.queue().total == 0
    assert len(spool.dead_letters()) == 3


def write_first(spool: Spool, count: int) -> None:
    """As a flush that writes the oldest straight from the inbox."""
    taken = spool.straight(limit=count, max_bytes=MIB)
    assert taken is not None
    numbers = tuple(operation.id for operation in taken.operations)
    outcome = Outcome("target", written=numbers, settled_tables=frozenset("t"))
    flush = FlushRecord(0.0, len(numbers), len(numbers), 0.1)
    assert spool.settle_straight(taken, outcome, "n", flush, [])


def extend_by(spool: Spool, count: int) -> list[int]:
    """Queue operations whose records are of one size."""
    return spool.extend(("insert", "t", {"a": 1000 + n}) for n in range(count))


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize(
    ("given", "written", "anew"),
    [(70, 59, False), (70, 60, True), (100, 79, False), (100, 80, True), (100, 99, True)],
)
def test_the_inbox_begins_anew_when_much_is_written_and_little_waits(
    path, clock, monkeypatch, durability, given, written, anew
):
    with closing(Spool.open(path, clock=clock, durability=durability)) as spool:
        numbers = extend_by(spool, given)
        one = spool._file.fresh_bytes() // given
        monkeypatch.setattr(module, "ANEW", 60 * one)
        monkeypatch.setattr(module, "SLICE", 20 * one)
        write_first(spool, written)
        bounds = (0, given - written) if anew else (written, given)
        assert spool._file._inbox.bounds() == (bounds[0] * one, bounds[1] * one)
        numbers += extend_by(spool, 5)
        assert spool.queue().total == given + 5 - written
        assert ids(spool) == numbers[written:]
        assert_law(spool)


def test_producers_that_never_pause_do_not_make_the_inbox_grow(spool, monkeypatch):
    extend_by(spool, 100)
    one = spool._file.fresh_bytes() // 100
    monkeypatch.setattr(module, "ANEW", 300 * one)
    monkeypatch.setattr(fold, "insert", None)
    for _ in range(30):
        extend_by(spool, 100)
        write_first(spool, 100)
        spool.checkpoint()
        assert spool._file.fresh_bytes() <= 500 * one
    write_first(spool, 100)
    assert spool.conservation().written == 3100


@pytest.mark.parametrize(
    ("given", "written", "folded"), [(100, 0, False), (101, 0, True), (101, 1, False)]
)
def test_what_waits_is_brought_into_the_tables_when_it_is_too_much(
    spool, monkeypatch, given, written, folded
):
    extend_by(spool, given)
    one = spool._file.fresh_bytes() // given
    monkeypatch.setattr(spoolfile, "INBOX_BYTES", 100 * one)
    if written:
        write_first(spool, written)
    spool.checkpoint()
    assert (spool._file.fresh_bytes() == 0) is folded
    assert len(ids(spool)) == given - written


def test_the_inbox_begins_anew_at_the_latest_when_it_is_very_large(spool, monkeypatch):
    extend_by(spool, 100)
    write_first(spool, 40)
    monkeypatch.setattr(spoolfile, "LARGEST_INBOX", spool._file.fresh_bytes())
    spool.checkpoint()
    assert spool._file.fresh_bytes() > 0
    extend_by(spool, 1)
    spool.checkpoint()
    assert spool._file.fresh_bytes() == 0
    assert len(ids(spool)) == 61


def test_more_than_can_be_counted_quickly_is_brought_into_the_tables(spool, monkeypatch):
    numbers = fill(spool, 10)
    monkeypatch.setattr(spoolfile, "COUNTED", spool._file.fresh_bytes())
    assert spool.queue().total == 10
    assert spool._file.fresh_bytes() > 0
    numbers += fill(spool, 1)
    assert spool.queue().total == 11
    assert spool._file.fresh_bytes() == 0
    assert ids(spool) == numbers


def test_who_has_accepted_nothing_leaves_the_inbox_as_it_is(spool, path, clock):
    fill(spool, 3)
    waiting = spool._file.fresh_bytes()
    with closing(Spool.open(path, clock=clock)) as other:
        assert other.queue().total == 3
    assert spool._file.fresh_bytes() == waiting


def test_a_caller_whose_inbox_was_filled_again_at_once_tries_again(spool, monkeypatch):
    append, refusals = module.Inbox.append, iter([module.InboxFull(), module.InboxFull()])

    def full_at_first(inbox: module.Inbox, rows: Sequence[Row]) -> range:
        for refusal in refusals:
            raise refusal
        return append(inbox, rows)

    monkeypatch.setattr(module.Inbox, "append", full_at_first)
    number = spool.append("insert", "t", {"a": 1})
    assert ids(spool) == [number]


def test_name_of_a_table_may_not_be_endless(spool):
    for length in (1001, 70_000):
        with pytest.raises(InvalidOperation) as caught:
            spool.append("insert", "t" * length, {"a": 1})
        assert caught.value.field == "table"
    assert spool.append("insert", "ü" * 1000, {"a": 1})
    assert len(ids(spool, "ü" * 1000)) == 1


@pytest.mark.parametrize("durability", ["process", "power"])
def test_power_puts_each_accepted_operation_on_the_disk(path, inbox, durability, monkeypatch):
    from helena_cli.batch import inbox as module

    synced: list[bytes] = []
    monkeypatch.setattr(module, "put_on_disk", lambda fd: synced.append(inbox.read_bytes()))
    with closing(Spool.open(path, durability=durability)) as spool:
        spool.append("insert", "t", {"a": "first"})
        spool.extend([("insert", "t", {"a": "second"}), ("insert", "t", {"a": "third"})])
    if durability == "power":
        assert [b"first" in content for content in synced] == [True, True]
        assert b"third" in synced[1]
        # The numbers that make the records count went before.
        assert synced[0][:PAGE] != synced[1][:PAGE]
    else:
        assert synced == []


def test_interrupt_while_waiting_for_another_process_leaves_nothing_locked(path):
    """The lock comes in the very moment of the interrupt: whoever gets it must give it back."""
    spool, other = Spool.open(path), Spool.open(path)
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    waiting = threading.Event()

    def interrupt() -> None:
        waiting.wait()
        # Nothing tells from outside that SQLite waits now.
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        holder.execute("ROLLBACK")

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.set()
        while True:
            spool.request_flush()
    thread.join()
    holder.close()
    # It would have to wait for half a minute, and fail.
    assert other.append("insert", "t", {"a": 1})
    assert other.request_flush()
    assert_law(other)
    other.close()
    spool.close()
