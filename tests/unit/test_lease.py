"""The lock between processes. Two objects in one process are strangers to it, like processes."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from helena_cli.batch.lease import Lease
from helena_cli.errors import SpoolUnavailable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lease"


def test_one_has_it_at_a_time(path: Path):
    first, second = Lease(path), Lease(path)
    assert first.acquire()
    assert first.acquire()
    assert not second.acquire()
    first.release()
    first.release()
    assert second.acquire()
    second.release()


def test_whoever_waits_gets_it_when_it_is_free(path: Path):
    first, second = Lease(path), Lease(path)
    assert first.acquire()
    waiting = threading.Thread(target=second.acquire, args=(60.0,))
    waiting.start()
    first.release()
    waiting.join(60)
    assert second.held
    second.release()


def test_looking_shows_another_holder_and_takes_nothing(path: Path):
    holder, looker = Lease(path), Lease(path)
    assert not looker.held_by_anyone()
    assert holder.acquire()
    assert holder.held_by_anyone()
    assert looker.held_by_anyone()
    assert not looker.held
    holder.release()
    assert not looker.held_by_anyone()


def test_somebody_who_merely_looks_is_not_taken_for_a_holder(path: Path):
    """A script that took `helena status` for a flusher would leave its operations behind."""
    looking = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    lease, answers = Lease(path), list[bool]()
    waiting = threading.Thread(target=lambda: answers.append(lease.acquire()))
    waiting.start()
    waiting.join(0.2)
    os.close(looking)
    waiting.join(60)
    assert answers == [True]
    lease.release()


def test_release_frees_it_although_a_copy_of_the_descriptor_lives_on(path: Path):
    """A child that was forked without Python's knowledge has such a copy."""
    lease = Lease(path)
    assert lease.acquire()
    inode = path.stat().st_ino
    (held,) = (fd for fd in map(int, os.listdir("/dev/fd")) if _inode(fd) == inode)
    copy = os.dup(held)
    lease.release()
    assert not Lease(path).held_by_anyone()
    os.close(copy)


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return 0


def test_a_missing_directory_is_a_clear_error(tmp_path: Path):
    with pytest.raises(SpoolUnavailable):
        Lease(tmp_path / "nowhere" / "a.lease").acquire()
