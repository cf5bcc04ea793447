"""Many processes, threads and forks on one spool."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helena_cli.batch.ledger import Flusher
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from tests.spools import assert_law, fill, ids, settle

SPAWN = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.spool"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    with closing(Spool.open(path)) as spool:
        yield spool
        assert_law(spool)


def _append(path: Path, number: int, accepted: Any) -> None:
    """Two threads on one spool, one operation at a time and many at once."""
    found: list[int] = []
    noise = random.Random(number)
    with closing(Spool.open(path)) as spool:

        def append() -> None:
            for n in range(100):
                table = f"t{noise.randrange(3)}"
                if n % 10:
                    found.append(spool.append("insert", table, {"n": n}))
                else:
                    found.extend(spool.extend(("message", table, {"n": k}) for k in range(20)))

        threads = [threading.Thread(target=append) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    accepted.put(found)


def _flush(path: Path, stop: Any, settled: Any) -> None:
    """Settle in all ways until told to stop and nothing is left."""
    noise = random.Random(0)
    written: list[int] = []
    buried: list[int] = []
    with closing(Spool.open(path)) as spool:
        while True:
            ending = stop.is_set()
            taken = [o.id for o in spool.take(limit=500, max_bytes=1 << 30) if o.due]
            if ending and not taken:
                break
            noise.shuffle(taken)
            dead, held = taken[:2], {number: 0.0 for number in taken[2:4]}
            rest = taken[4:]
            spool.remember_nonce("n", ["t0", "t1", "t2"])
            spool.bury([Verdict(number, "23505", "duplicate") for number in dead])
            half = len(rest) // 2
            settle(spool, rest[:half], coalesced=rest[half:], held=held, tables=["t0", "t1", "t2"])
            spool.beat(Flusher(os.getpid(), "host", 1.0, 2.0))
            spool.checkpoint()
            written += rest
            buried += dead
    settled.put((written, buried))


def test_nothing_is_lost_or_doubled_between_many_appenders_and_a_flusher(spool, path):
    accepted, settled, stop = SPAWN.Queue(), SPAWN.Queue(), SPAWN.Event()
    flusher = SPAWN.Process(target=_flush, args=(path, stop, settled))
    appenders = [SPAWN.Process(target=_append, args=(path, n, accepted)) for n in range(3)]
    for process in (flusher, *appenders):
        process.start()
    given = [number for _ in appenders for number in accepted.get(timeout=60)]
    stop.set()
    written, buried = settled.get(timeout=60)
    for process in (flusher, *appenders):
        process.join(30)
        assert process.exitcode == 0
    assert len(given) == len(set(given)) == 3 * 2 * (90 + 200)
    assert len(written) == len(set(written))
    assert sorted(written + buried) == sorted(given)
    assert sorted(letter.id for letter in spool.dead_letters()) == sorted(buried)
    law = spool.conservation()
    assert (law.accepted, law.spooled) == (len(given), 0)
    assert law.written + law.coalesced == len(written)


def _write_much(path: Path, failed: Any) -> None:
    try:
        with closing(Spool.open(path)) as spool:
            for n in range(60):
                spool.request_flush()
                settle(spool, [spool.append("insert", "t", {"n": n})])
                spool.beat(Flusher(n, "host", 1.0, 2.0))
                spool.retry([1])
                spool.queue()
    except BaseException as error:
        failed.put(repr(error))
        raise
    failed.put(None)


def test_processes_that_write_at_once_wait_for_each_other(spool, path):
    failed = SPAWN.Queue()
    processes = [SPAWN.Process(target=_write_much, args=(path, failed)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [failed.get(timeout=60) for _ in processes] == [None] * 4
    for process in processes:
        process.join(30)
    assert spool.conservation().written == 4 * 60


def _open_new(path: Path, barrier: Any, found: Any) -> None:
    barrier.wait(60)
    with closing(Spool.open(path)) as spool:
        found.put((spool.id, spool.append("insert", "t", {"a": 1})))


def test_processes_that_open_a_new_spool_at_once_share_it(path):
    barrier, found = SPAWN.Barrier(4), SPAWN.Queue()
    processes = [SPAWN.Process(target=_open_new, args=(path, barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len({identity for identity, _ in answers}) == 1
    with closing(Spool.open(path)) as spool:
        assert ids(spool) == sorted(number for _, number in answers)
        assert_law(spool)


def test_processes_killed_in_the_midst_of_their_work_lose_nothing_that_was_accepted(spool, path):
    script = (
        "import sys; from pathlib import Path; from helena_cli.batch.spool import Spool\n"
        "spool = Spool.open(Path(sys.argv[1])); n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    if n % 5 == 0: spool.queue()\n"
        "    if n % 7 == 0: spool.request_flush()\n"
        "    print(spool.append('insert', 't', {'a': 'x' * 200}), flush=True)\n"
    )
    noise = random.Random(5)
    given: list[int] = []
    for _ in range(8):
        processes = [
            subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for process in processes:
            assert process.stdout
            for _ in range(noise.randrange(1, 60)):
                given.append(int(process.stdout.readline()))
            process.send_signal(signal.SIGKILL)
        for process in processes:
            out, _ = process.communicate()
            given += [int(line) for line in out.split(b"\n")[:-1] if line]
    found = ids(spool)
    assert len(found) == len(set(found))
    assert set(given) <= set(found)
    # At most one of each process was accepted without having been printed.
    assert len(found) - len(given) <= 16
    later = spool.append("insert", "t", {"a": 1})
    assert ids(spool)[-1] == later


# Forks


def in_child(work: Callable[[], Any], *, how: str = "exit") -> Any:
    """Fork, do it in the child, and return what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        # A child that hangs must not keep the tests from ending.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            os.close(read)
            os.write(write, json.dumps(work()).encode())
            os.close(write)
            code = 0
        finally:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if how == "kill" else 0)
    return json.loads(answer)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_forked_child_appends_through_a_connection_of_its_own(spool, how):
    before = spool.append("insert", "t", {"a": 1})

    def work() -> list[int]:
        number = spool.append("insert", "t", {"b": 2})
        settle(spool, [before])
        return [number, *ids(spool)]

    number, *seen = in_child(work, how=how)
    assert seen == [number]
    after = spool.append("insert", "t", {"c": 3})
    assert ids(spool) == [number, after]
    assert spool.conservation().written == 1


def test_child_that_only_exits_takes_nothing_from_its_parent(spool):
    numbers = fill(spool, 3)
    assert ids(spool) == numbers
    assert in_child(lambda: None) is None
    number = spool.append("insert", "t", {"a": 1})
    assert ids(spool) == [*numbers, number]


def test_child_goes_on_after_its_parent_closed_the_spool(path):
    """Whoever closes a spool last deletes its log: the parent must see that the child has it."""
    spool = Spool.open(path)
    fill(spool, 3)
    assert len(ids(spool)) == 3
    ready, done = SPAWN.Event(), SPAWN.Event()

    def work() -> None:
        fill(spool, 2)
        spool.fold()
        ready.set()
        done.wait(30)
        # Written into the log that the parent left alone.
        fill(spool, 2)
        spool.fold()
        os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=work)
    child.start()
    assert ready.wait(30)
    fill(spool, 1)
    spool.fold()
    spool.close()
    done.set()
    child.join(30)
    with closing(Spool.open(path)) as spool:
        assert len(ids(spool)) == 8
        assert_law(spool)


def test_fork_in_the_midst_of_other_threads_work_leaves_parent_and_child_usable(spool, path):
    stop = threading.Event()
    accepted: list[int] = []

    def work() -> None:
        while not stop.is_set():
            accepted.append(spool.append("insert", "t", {"a": 1}))
            spool.queue()
            spool.request_flush()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            accepted.append(in_child(lambda: spool.append("insert", "t", {"b": 1})))
            accepted.append(in_child(lambda: [spool.queue().total, accepted[-1]][1]))
            accepted.pop()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ids(spool) == sorted(accepted)


_SHARED: list[Spool] = []


def _fill_shared(count: int) -> list[int]:
    return fill(_SHARED[0], count)


def test_pool_of_forked_workers_uses_the_spool_of_its_parent(spool):
    _SHARED.append(spool)
    with contextlib.ExitStack() as stack:
        stack.callback(_SHARED.clear)
        fill(spool, 1)
        with FORK.Pool(3) as pool:
            found = pool.map(_fill_shared, [5] * 9)
            pool.close()
            pool.join()
    numbers = [number for part in found for number in part]
    assert len(set(numbers)) == 45
    assert set(numbers) <= set(ids(spool))
    assert spool.queue().total == 46


def test_grandchildren_and_daemons_can_use_it_too(spool):
    """As a service does that detaches itself from the terminal: fork, setsid, fork."""

    def work() -> int:
        os.setsid()
        return int(in_child(lambda: spool.append("insert", "t", {"a": 1})))

    number = in_child(work)
    assert ids(spool) == [number]


def test_two_spools_of_one_process_do_not_disturb_each_others_locks(path):
    """POSIX locks belong to the process: closing one descriptor could drop those of the other."""
    first, second = Spool.open(path), Spool.open(path)
    fill(first, 3)
    assert len(ids(second)) == 3
    first.close()
    fill(second, 2)
    assert len(ids(second)) == 5
    # Another process that opens and closes it must not take itself for the last one.
    script = (
        "import sys; from pathlib import Path; from helena_cli.batch.spool import Spool;"
        "spool = Spool.open(Path(sys.argv[1])); spool.queue(); spool.close()"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True)
    assert Path(f"{path}-wal").exists()
    fill(second, 1)
    assert len(ids(second)) == 6
    second.close()
