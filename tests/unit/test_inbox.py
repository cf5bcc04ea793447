"""What was accepted into the inbox comes into the tables, in order and once, whatever dies."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helena_cli.batch.inbox import PAGE
from helena_cli.batch.operation import Operation
from helena_cli.batch.spool import Spool

MIB = 1024 * 1024


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.spool"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    spool = Spool.open(path)
    yield spool
    law = spool.conservation()
    assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled
    spool.close()


def taken(spool: Spool) -> list[Operation]:
    return spool.take(limit=10**6, max_bytes=2**40)


def inbox(path: Path) -> Path:
    return Path(f"{path}.inbox")


def test_another_process_sees_what_was_accepted_before_it_was_folded(spool: Spool, path: Path):
    ids = [spool.append("insert", "t", {"n": n}) for n in range(3)]
    other = Spool.open(path)
    assert [operation.id for operation in taken(other)] == ids
    other.close()


def test_a_process_that_is_killed_leaves_what_it_was_told_is_accepted(path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool; spool = Spool.open(Path(sys.argv[1]));"
        "[spool.append('insert', 't', {'n': n}) for n in range(50)];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(path)], cwd=os.getcwd())
    assert answer.returncode == -signal.SIGKILL
    spool = Spool.open(path)
    assert [operation.data for operation in taken(spool)] == [b'{"n":%d}' % n for n in range(50)]
    spool.close()


def test_records_that_come_again_after_a_death_between_commit_and_release_count_once(
    spool: Spool, path: Path
):
    ids = [spool.append("insert", "t", {"n": n}) for n in range(5)]
    before = inbox(path).read_bytes()
    assert len(taken(spool)) == 5
    # As if the process had died before it released the inbox: the bounds stand as they were.
    with inbox(path).open("r+b") as file:
        file.write(before[:PAGE])
    assert [operation.id for operation in taken(spool)] == ids
    assert spool.conservation().accepted == 5


def test_a_record_that_was_cut_off_was_not_accepted_and_is_overwritten(spool: Spool, path: Path):
    first = spool.append("insert", "t", {"n": 1})
    with inbox(path).open("ab") as file:
        file.write(b"half of a record")
    second = spool.append("insert", "t", {"n": 2})
    assert [operation.id for operation in taken(spool)] == [first, second]


def test_damaged_records_are_counted_as_lost_and_the_queue_goes_on(spool: Spool, path: Path):
    kept = spool.append("insert", "t", {"n": 1})
    at = inbox(path).stat().st_size
    spool.append("insert", "t", {"text": "x" * 100})
    with inbox(path).open("r+b") as file:
        file.seek(at + 60)
        file.write(b"\xff\xff")
    assert [operation.id for operation in taken(spool)] == [kept]
    assert spool.lost() == 1
    later = spool.append("insert", "t", {"n": 3})
    assert [operation.id for operation in taken(spool)] == [kept, later]


def test_many_operations_come_in_together_or_not_at_all(spool: Spool):
    with pytest.raises(ValueError, match="refused"):
        spool.extend([("insert", "t", {"n": 1}), ("insert", "t", {})])
    assert taken(spool) == []
    assert len(spool.extend(("insert", "t", {"n": n}) for n in range(1000))) == 1000
    assert spool.queue().total == 1000


def test_an_operation_larger_than_what_is_read_at_once_is_read_whole(spool: Spool):
    spool.append("insert", "t", {"text": "x" * 7 * MIB})
    spool.append("insert", "t", {"n": 2})
    assert [len(operation.data) > MIB for operation in taken(spool)] == [True, False]


def test_what_was_accepted_for_the_original_is_a_dead_letter_of_its_copy(
    spool: Spool, path: Path, state_dir: Path
):
    spool.append("insert", "t", {"n": 1})
    assert spool.queue().total == 1
    queued = spool.append("insert", "t", {"n": 2})
    copy = state_dir / "copy"
    copy.mkdir()
    for file in state_dir.glob("test.spool*"):
        shutil.copy(file, copy)
    other = Spool.open(copy / path.name)
    assert taken(other) == []
    assert queued in {letter.id for letter in other.dead_letters()}
    assert {letter.sqlstate for letter in other.dead_letters()} == {"HL004"}
    law = other.conservation()
    assert law.accepted == law.dead == 2
    fresh = other.append("insert", "t", {"n": 3})
    assert [operation.id for operation in taken(other)] == [fresh]
    other.close()


def test_a_retried_dead_letter_and_later_operations_keep_the_order_of_their_ids(spool: Spool):
    from helena_cli.batch.verdict import Verdict

    first = spool.append("insert", "t", {"n": 1})
    spool.bury([Verdict(first, "23505", "no")])
    second = spool.append("insert", "t", {"n": 2})
    spool.retry([first])
    third = spool.append("insert", "t", {"n": 3})
    ids = [operation.id for operation in taken(spool)]
    assert ids[0] == second
    assert ids[2] == third
    assert first < second < ids[1] < third


def test_ids_go_on_growing_when_the_inbox_is_lost(path: Path):
    spool = Spool.open(path, clock=lambda: 2_000_000_000.0)
    last = spool.append("insert", "t", {"n": 1})
    spool.close()
    inbox(path).unlink()
    spool = Spool.open(path, clock=lambda: 1_000_000_000.0)
    assert spool.append("insert", "t", {"n": 2}) > last
    spool.close()


def _append(path: Path, worker: int) -> None:
    spool = Spool.open(path)
    for n in range(300):
        spool.append("insert", "t", {"worker": worker, "n": n})
    spool.close()


def test_processes_that_append_and_fold_at_once_lose_nothing_and_keep_their_order(path: Path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append, args=(path, worker)) for worker in range(4)]
    for process in workers:
        process.start()
    reader = Spool.open(path)
    seen: list[int] = []
    while any(process.is_alive() for process in workers):
        ids = [operation.id for operation in taken(reader)]
        # Nothing may turn up below what was seen already: the position may be past it.
        assert ids[: len(seen)] == seen
        seen = ids
    for process in workers:
        process.join()
    found = [operation.columns() for operation in taken(reader)]
    for worker in range(4):
        numbers = [int(bytes(c["n"])) for c in found if int(bytes(c["worker"])) == worker]
        assert numbers == list(range(300))
    reader.close()
