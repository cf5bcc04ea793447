"""The lock between processes that ends with its holder."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helena_cli.batch.lease import Lease

HOLD = (
    "import sys; from pathlib import Path; from helena_cli.batch.lease import Lease;"
    "lease = Lease(Path(sys.argv[1])); print(lease.acquire(30), flush=True);"
    "sys.stdin.readline(); lease.release(); print('released', flush=True); sys.stdin.readline()"
)


@pytest.fixture
def path(state_dir: Path) -> Path:
    return state_dir / "test.lease"


@pytest.fixture
def lease(path: Path) -> Iterator[Lease]:
    lease = Lease(path)
    yield lease
    lease.release()


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease, and gives it back when it is told so."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        yield process
        if process.poll() is None:
            process.communicate("\n\n", timeout=30)


def test_lease_is_held_by_one_object_at_a_time(lease, path):
    other = Lease(path)
    assert lease.acquire()
    assert lease.held
    assert not other.acquire()
    assert not other.held
    lease.release()
    assert not lease.held
    assert other.acquire()
    other.release()


def test_lease_is_held_by_one_process_at_a_time(lease, path):
    with holder(path):
        assert not lease.acquire()
        assert lease.held_by_anyone()
        assert not lease.held


def test_acquiring_and_releasing_twice_changes_nothing(lease, path):
    lease.release()
    assert lease.acquire()
    assert lease.acquire()
    lease.release()
    lease.release()
    assert not Lease(path).held_by_anyone()


def test_lease_ends_with_a_killed_holder(lease, path):
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert not lease.held_by_anyone()
        assert lease.acquire()


def test_lease_that_is_waited_for_is_taken_when_it_is_given_back(lease, path):
    with holder(path) as process:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        assert lease.acquire(timeout=30)


def test_waiting_ends_after_its_time(lease, path):
    with holder(path):
        started = time.monotonic()
        assert not lease.acquire(timeout=0.2)
        assert time.monotonic() - started >= 0.2


def test_whoever_looks_does_not_take_it(lease, path):
    assert not lease.held_by_anyone()
    assert not lease.held
    other = Lease(path)
    assert other.acquire()
    assert lease.held_by_anyone()
    assert other.held_by_anyone()
    other.release()
    assert not lease.held_by_anyone()


def test_whoever_looks_all_the_time_does_not_keep_it_from_being_taken(lease, path):
    """Else a script at its end would believe that another process flushes for it."""
    stop = threading.Event()

    def look() -> None:
        watcher = Lease(path)
        while not stop.is_set():
            watcher.held_by_anyone()

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert lease.acquire()
            lease.release()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_two_that_look_at_once_do_not_see_each_other(path):
    seen: list[bool] = []
    barrier = threading.Barrier(2)

    def look() -> None:
        watcher = Lease(path)
        barrier.wait()
        seen.extend(watcher.held_by_anyone() for _ in range(500))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 1000


def in_child(lease: Lease, *, release: bool = False) -> int:
    """Fork; the child's exit status tells what it sees: 1 it holds it, 2 somebody holds it."""
    pid = os.fork()
    if pid == 0:
        if release:
            lease.release()
        os._exit(1 * lease.held + 2 * Lease(lease.path).held_by_anyone())
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize("release", [False, True])
def test_forked_child_neither_has_the_lease_nor_gives_it_back(lease, path, release):
    assert lease.acquire()
    assert in_child(lease, release=release) == 2
    assert lease.held
    assert not Lease(path).acquire()


def test_child_that_lives_on_does_not_keep_its_parents_lease(path):
    script = (
        "import os, sys; from pathlib import Path; from helena_cli.batch.lease import Lease\n"
        "lease = Lease(Path(sys.argv[1])); lease.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    sys.stdin.readline(); os._exit(0)\n"
        "print(pid, flush=True); os._exit(0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout
        process.stdout.readline()
        process.wait(30)
        # The child still runs and waits for a line; it may have to come to that yet.
        assert Lease(path).acquire(30)


def test_started_program_does_not_inherit_the_lease(lease, path):
    assert lease.acquire()
    program = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.readline()"],
        stdin=subprocess.PIPE,
        close_fds=False,
    )
    lease.release()
    assert Lease(path).acquire()
    program.communicate(b"\n", timeout=30)


def test_file_belongs_to_the_user_alone(lease, path):
    before = os.umask(0)
    try:
        lease.acquire()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_lease_of_a_moved_directory_is_looked_for_where_it_was(state_dir, monkeypatch):
    monkeypatch.chdir(state_dir)
    lease = Lease(Path("test.lease"))
    monkeypatch.chdir("/")
    assert lease.acquire()
    assert not Lease(state_dir / "test.lease").acquire()
    lease.release()
