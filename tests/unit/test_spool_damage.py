"""A damaged spool opens, is used, and says what it lost."""

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from helena_cli.batch.flush import Waiting
from helena_cli.batch.ledger import Flusher, FlushRecord
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from tests.spools import Clock, assert_law, ids, settle

PAGE = 4096
BIG = 1 << 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where possible: these tests write many files and wait for each."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="helena-", dir=parent))
    (path / "state").mkdir()
    yield path / "state"
    shutil.rmtree(path)


class Before(Struct):
    """What a spool held before it was damaged."""

    path: Path
    content: bytes
    id: str
    queued: dict[int, bytes]
    dead: dict[int, bytes]

    @property
    def pages(self) -> int:
        return len(self.content) // PAGE

    @property
    def kept(self) -> Path:
        """Another name of the file: another file would be a copy."""
        return self.path.parent.with_name(f"{self.path.parent.name}-kept")

    def page_of(self, number: int) -> int:
        """Where the page begins that holds this operation."""
        return self.content.index(self.queued[number]) // PAGE * PAGE

    @property
    def broken(self) -> bytes:
        """The content without one page of operations."""
        start = self.page_of(self.some)
        return self.content[:start] + bytes(PAGE) + self.content[start + PAGE :]

    @property
    def some(self) -> int:
        """An operation in the midst of others, in a lane that flows."""
        return sorted(self.queued)[40]

    def destroy(self, start: int) -> None:
        """Zero a page of the file as it is now."""
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(PAGE))

    def restore(self, content: bytes) -> None:
        """Put the file back, with this content."""
        for other in self.path.parent.iterdir():
            other.unlink()
        os.link(self.kept, self.path)
        with self.path.open("r+b") as file:
            file.truncate(0)
            file.write(content)


@pytest.fixture
def before(folder: Path) -> Before:
    """A spool with something in each of its tables, on some sixty pages."""
    spool = Spool.open(folder / "test.spool")
    noise = random.Random(1)
    for table in ("t", "u", "s.v"):
        spool.extend(
            (("insert", "update", "message")[n % 3], table, {"n": n, "x": noise.randbytes(60)})
            for n in range(150)
        )
        # These need pages of their own.
        spool.extend(("insert", table, {"x": noise.randbytes(4000)}) for _ in range(2))
    numbers = ids(spool)
    spool.bury([Verdict(i, "23505", "duplicate", "t_key") for i in numbers[:60]])
    settle(spool, numbers[60:65], coalesced=numbers[65:67], held={numbers[67]: 0.0})
    spool.remember_nonce("nonce", ["t", "u", "s.v"])
    spool.wait("u", Waiting("no such table", "42P01", "create it"), 0.0)
    spool.learn_target("target")
    spool.beat(Flusher(1, "host", 1.0, 2.0))
    for _ in range(60):
        spool.record(FlushRecord(1.0, 2, 3, 0.5))
    assert_law(spool)
    queued = {o.id: o.data for table in ("t", "u", "s.v") for o in spool.queued(table)}
    dead = {letter.id: letter.data for letter in spool.dead_letters()}
    known = Before(spool.path, b"", spool.id, queued, dead)
    spool.close()
    known.content = known.path.read_bytes()
    os.link(known.path, known.kept)
    return known


def use(spool: Spool, before: Before) -> None:
    """Do with a spool whatever can be done."""
    last = max(before.queued)
    assert spool.append("insert", "t", {"a": 1}) > last
    assert spool.extend([("update", "new", {"a": 1})])[0] > last
    for lane in spool.lanes():
        spool.resume(lane.table)
    taken = spool.take(limit=BIG, max_bytes=BIG)
    assert len(taken) == spool.queue().total
    spool.remember_nonce("next", {operation.table for operation in taken})
    spool.sync()
    spool.bury([Verdict(o.id, "23505", "duplicate") for o in taken[:10]])
    settle(spool, [o.id for o in taken[10:60]], held={o.id: 5.0 for o in taken[60:61]})
    spool.record(FlushRecord(1.0, 2, 3, 0.5))
    spool.beat(Flusher(1, "host", 1.0, 2.0))
    assert spool.flushes().count
    assert spool.flusher()
    spool.request_flush()
    spool.pressure()
    some = [letter.id for letter in spool.dead_letters()[:5]]
    assert spool.retry(some) == len(some) > 0
    rest = [letter.id for letter in spool.dead_letters()]
    assert spool.drop(rest) == len(rest)
    for table in ("t", "u", "s.v"):
        spool.expire_lane(table, "42P01", "gone")
    assert_law(spool)


def found_again(spool: Spool, before: Before) -> tuple[set[int], set[int]]:
    """The ids that still wait and those that are dead now, all with what they held."""
    queued = {o.id: o for lane in spool.lanes() for o in spool.queued(lane.table)}
    dead = {letter.id: letter for letter in spool.dead_letters()}
    for number, operation in queued.items():
        assert operation.data == before.queued[number]
    for number, letter in dead.items():
        assert letter.data == (before.queued | before.dead)[number]
    return set(queued), set(dead)


def damages(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The content with each page in turn replaced by zeros and by noise."""
    noise = random.Random(2)
    for number in range(len(content) // PAGE):
        start, end = number * PAGE, (number + 1) * PAGE
        yield f"page {number + 1} zero", content[:start] + bytes(PAGE) + content[end:]
        yield f"page {number + 1} noise", content[:start] + noise.randbytes(PAGE) + content[end:]


def test_damage_of_any_page_is_survived_and_the_loss_is_counted(before, caplog):
    caplog.set_level(logging.CRITICAL)
    assert 40 < before.pages < 120
    kept = lost_some = 0
    for what, content in damages(before.content):
        before.restore(content)
        spool = Spool.open(before.path)
        # Reading all of it finds the damage wherever it is.
        try:
            spool.take(limit=BIG, max_bytes=BIG)
            queued, dead = found_again(spool, before)
            assert_law(spool)
            lost = spool.lost()
            assert len(queued) + len(dead) + lost == len(before.queued) + len(before.dead)
            if spool.id == before.id:
                kept += 1
                assert spool.standing().nonces["t"] >= {"nonce"}
            else:
                assert not queued
            lost_some += lost > 0
            use(spool, before)
        except Exception as error:
            raise AssertionError(what) from error
        finally:
            spool.close()
    assert kept > before.pages * 1.8
    assert lost_some > before.pages


def test_undamaged_spool_is_left_alone(before):
    spool = Spool.open(before.path)
    use(spool, before)
    assert (spool.id, spool.lost()) == (before.id, 0)
    spool.close()
    assert [p.name for p in before.path.parent.iterdir() if "damaged" in p.name] == []


def open_silently(before: Before) -> Spool:
    spool = Spool.open(before.path)
    spool.take(limit=BIG, max_bytes=BIG)
    return spool


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_file_is_survived_and_used(before, share):
    before.restore(before.content[: int(len(before.content) * share)])
    spool = open_silently(before)
    queued, dead = found_again(spool, before)
    if spool.id == before.id:
        assert len(queued) + len(dead) + spool.lost() == len(before.queued) + len(before.dead)
    use(spool, before)
    spool.close()


@pytest.mark.parametrize(
    "content", [b"\0" * 9000, b"{}", b"x" * 50_000, random.Random(3).randbytes(9000)]
)
def test_garbage_in_place_of_the_file_is_moved_aside(before, content):
    before.restore(content)
    spool = Spool.open(before.path)
    assert spool.id != before.id
    use(spool, before)
    (aside,) = before.path.parent.glob("*.damaged-*")
    assert aside.read_bytes()[PAGE : len(content)] == content[PAGE:]
    spool.close()


def test_empty_file_becomes_a_new_spool(before):
    before.restore(b"")
    spool = Spool.open(before.path)
    assert spool.id != before.id
    use(spool, before)
    spool.close()


def test_damaged_file_is_kept_private_and_named_in_the_log(before, caplog):
    before.restore(before.broken)
    spool = open_silently(before)
    (aside,) = before.path.parent.glob("*.damaged-*")
    assert str(aside) in caplog.text
    assert "lost" in caplog.text
    assert {p.stat().st_mode & 0o777 for p in before.path.parent.iterdir()} == {0o600}
    spool.close()


def crash(path: Path, work: str) -> list[int]:
    """Let a process do something with a spool and end without closing it; what it printed."""
    script = (
        "import json, os, sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool;"
        "spool = Spool.open(Path(sys.argv[1]));"
        f"print(json.dumps({work}), flush=True); os._exit(0)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    return list(json.loads(answer.stdout))


#: Into the tables, so that the log holds it.
QUEUE_SOME = "[spool.extend(('insert', 't', {'n': n}) for n in range(200)), spool.fold()][0]"


@pytest.mark.parametrize("main", ["empty", "missing"])
def test_log_without_its_file_is_read(folder, main):
    path = folder / "test.spool"
    numbers = crash(path, QUEUE_SOME)
    path.unlink()
    if main == "empty":
        path.touch()
    spool = Spool.open(path)
    # Where the file lay is written in it; so nobody knows whether it was a copy.
    assert [letter.id for letter in spool.dead_letters()] == numbers
    assert spool.append("insert", "t", {"a": 1}) > numbers[-1]
    assert_law(spool)
    spool.close()


def test_what_is_in_the_inbox_comes_into_the_repaired_spool(before):
    before.restore(before.broken)
    numbers = crash(before.path, "spool.extend(('insert', 't', {'n': n}) for n in range(20))")
    spool = open_silently(before)
    assert spool.id == before.id
    assert spool.lost() > 0
    assert ids(spool)[-20:] == numbers
    assert_law(spool)
    spool.close()


def test_what_only_the_log_holds_is_salvaged_too(before):
    before.restore(before.content)
    numbers = crash(before.path, QUEUE_SOME)
    before.destroy(before.page_of(before.some))
    spool = open_silently(before)
    assert spool.id == before.id
    assert 0 < spool.lost() < 100
    assert set(numbers) <= {o.id for o in spool.queued("t")}
    assert_law(spool)
    spool.close()


def test_first_page_that_only_the_file_had_is_replaced(before):
    """The pages of the log are read although the page that names the tables is gone."""
    before.restore(before.content)
    crash(before.path, "[spool.drop([letter.id for letter in spool.dead_letters()])]")
    before.destroy(0)
    spool = open_silently(before)
    assert spool.id == before.id
    queued, _ = found_again(spool, before)
    assert queued == set(before.queued)
    spool.close()


def test_copied_and_damaged_spool_does_not_keep_the_identity_of_the_original(before):
    copy = before.path.with_name("copy.spool")
    copy.write_bytes(before.broken)
    spool = Spool.open(copy)
    assert spool.id != before.id
    assert spool.queue().total == 0
    assert spool.lost() > 0
    assert_law(spool)
    spool.close()


def test_damage_is_noticed_and_repaired_while_others_have_the_file_open(before):
    before.restore(before.content)
    first, second = Spool.open(before.path), Spool.open(before.path)
    first.append("insert", "t", {"a": 1})
    before.destroy(before.page_of(before.some))
    # The second does not touch that page, but it appends to the repaired file.
    first.take(limit=BIG, max_bytes=BIG)
    number = second.append("insert", "t", {"b": 2})
    assert ids(first)[-1] == number
    assert ids(second) == ids(first)
    assert first.id == second.id == before.id
    second.close()
    # The one that closes last still folds the log of the new file, and deletes no other.
    third = Spool.open(before.path)
    assert third.append("insert", "t", {"c": 3}) == ids(first)[-1]
    first.close()
    third.close()
    fourth = Spool.open(before.path)
    assert len(ids(fourth)) == len(ids(fourth, "t")) > 3
    assert_law(fourth)
    fourth.close()


def test_process_that_has_the_damaged_file_open_goes_on_in_the_new_one(before):
    before.restore(before.content)
    script = (
        "import sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool;"
        "spool = Spool.open(Path(sys.argv[1]));"
        "print(spool.append('insert', 't', {'a': 1}), flush=True); sys.stdin.readline();"
        "print(spool.append('insert', 't', {'b': 2}), flush=True); sys.stdin.readline();"
        "spool.close()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, before.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    with process:
        first = int(process.stdout.readline())
        before.destroy(before.page_of(before.some))
        spool = open_silently(before)
        assert spool.lost() > 0
        process.stdin.write(b"\n")
        process.stdin.flush()
        second = int(process.stdout.readline())
        assert ids(spool)[-2:] == [first, second]
        third = spool.append("insert", "t", {"c": 3})
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(30) == 0
        assert ids(spool)[-3:] == [first, second, third]
    spool.close()
    reopened = Spool.open(before.path)
    assert ids(reopened)[-3:] == [first, second, third]
    assert_law(reopened)
    reopened.close()


def test_processes_that_find_the_damage_at_once_repair_it_once(before):
    before.restore(before.content)
    script = (
        "import sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool;"
        "spool = Spool.open(Path(sys.argv[1])); print(flush=True); sys.stdin.readline();"
        "spool.take(limit=1 << 30, max_bytes=1 << 30);"
        "print(spool.append('insert', 't', {'a': 1})); spool.close()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, before.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    before.destroy(before.page_of(before.some))
    answers = []
    for process in processes:
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        answers.append(int(out))
    assert len(set(answers)) == 3
    assert len(list(before.path.parent.glob("*.damaged-*[0-9]"))) == 1
    spool = Spool.open(before.path)
    assert spool.id == before.id
    assert ids(spool)[-3:] == sorted(answers)
    assert_law(spool)
    spool.close()


def test_repair_that_was_interrupted_begins_again(before, monkeypatch):
    from helena_cli.batch import salvage

    before.restore(before.broken)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    spool = Spool.open(before.path)
    for step in ("_settle", "_swap"):
        with monkeypatch.context() as patch:
            patch.setattr(salvage, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                spool.take(limit=BIG, max_bytes=BIG)
    spool.take(limit=BIG, max_bytes=BIG)
    assert spool.id == before.id
    queued, dead = found_again(spool, before)
    assert len(queued) + len(dead) + spool.lost() == len(before.queued) + len(before.dead)
    assert not before.path.with_name("test.spool.new").exists()
    spool.close()


def test_ids_grow_over_a_repair_although_the_clock_went_backwards(before):
    clock = Clock(1_000_000_000.0)
    before.restore(before.broken)
    spool = Spool.open(before.path, clock=clock)
    spool.take(limit=BIG, max_bytes=BIG)
    assert spool.lost()
    assert spool.append("insert", "t", {"a": 1}) > max(before.queued)
    spool.close()


def test_file_that_is_merely_locked_is_not_taken_for_damaged(before, monkeypatch):
    from helena_cli.batch import salvage

    before.restore(before.broken)
    monkeypatch.setattr(salvage, "PATIENCE", 0.01)
    script = (
        "import sqlite3, sys; holder = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "holder.execute('PRAGMA locking_mode = EXCLUSIVE');"
        "holder.execute('BEGIN EXCLUSIVE'); print(flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, before.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            salvage.rebuild(before.path, 1.0)
        process.communicate(b"\n", timeout=30)
    spool = open_silently(before)
    assert spool.id == before.id
    assert 0 < spool.lost() < 100
    spool.close()


def damage_row(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE operations SET kind = 'inzert' WHERE id = (SELECT max(id) FROM operations)",
        "UPDATE operations SET kind = CAST(x'ff' AS TEXT)"
        " WHERE id = (SELECT max(id) FROM operations)",
        "UPDATE operations SET data = 'text' WHERE id = (SELECT max(id) FROM operations)",
        "UPDATE operations SET data = x'0000' WHERE id = (SELECT max(id) FROM operations)",
        "UPDATE operations SET data = x'7b7b7d' WHERE id = (SELECT max(id) FROM operations)",
        "DELETE FROM meta WHERE key = 'home'",
        "DELETE FROM meta",
        "UPDATE meta SET value = x'ff'",
        "PRAGMA user_version = 0",
    ],
)
def test_row_that_nobody_wrote_does_not_stop_the_queue(before, statement):
    before.restore(before.content)
    damage_row(before.path, statement)
    spool = Spool.open(before.path)
    for lane in spool.lanes():
        spool.resume(lane.table)
    taken = spool.take(limit=BIG, max_bytes=BIG)
    if "7b7b7d" in statement:
        # To read each of them would cost more than this is worth: the writer refuses it.
        taken = taken[:-1]
    assert all(isinstance(json.loads(operation.data), dict) for operation in taken)
    settle(spool, [o.id for o in taken], tables=["t", "u", "s.v"])
    assert spool.append("insert", "t", {"a": 1}) > max(before.queued)
    spool.close()


def test_flipped_bytes_raise_nothing_but_helenas_errors(before):
    """Many of them SQLite cannot notice; then at least nothing breaks that was not hit."""
    from helena_cli.errors import HelenaError

    noise = random.Random(4)
    for _ in range(200):
        content = bytearray(before.content)
        content[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
        before.restore(bytes(content))
        try:
            spool = Spool.open(before.path)
        except HelenaError:
            continue
        try:
            spool.queue()
            taken = spool.take(limit=BIG, max_bytes=BIG)
            settle(spool, [o.id for o in taken[:100]])
            spool.bury([Verdict(o.id, "23505", "duplicate") for o in taken[100:120]])
            spool.append("insert", "t", {"a": 1})
            spool.conservation()
            spool.dead_letters()
            spool.flushes()
        except HelenaError:
            pass
        finally:
            spool.close()
