"""The inbox on a disk that fails or is full, and one that another takes the place of."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helena_cli.batch import inbox
from helena_cli.batch.cycle import Cycle, Policy
from helena_cli.batch.flush import Batch, Outcome
from helena_cli.batch.inbox import Inbox
from helena_cli.batch.spool import Spool
from helena_cli.errors import SpoolError, SpoolFull, SpoolUnavailable
from tests.spools import assert_law, fill, ids
from tests.unit.test_cycle import ScriptedWriter, write_all


@pytest.fixture
def disk(state_dir: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(state_dir)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("No file system can be mounted here.")
    yield state_dir
    subprocess.run(["umount", state_dir], check=True)


def test_an_operation_that_could_not_be_put_on_the_disk_is_not_queued(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with closing(Spool.open(state_dir / "test.spool", durability="power")) as spool:
        first = spool.append("insert", "t", {"n": 1})
        with monkeypatch.context() as patch:
            patch.setattr(inbox, "put_on_disk", fail)
            with pytest.raises(SpoolUnavailable):
                spool.append("insert", "t", {"n": 2})
        later = spool.append("insert", "t", {"n": 3})
        assert ids(spool) == [first, later]
        assert_law(spool)


def test_a_queue_that_has_filled_its_disk_is_written_all_the_same(disk: Path):
    with closing(Spool.open(disk / "test.spool")) as spool:
        accepted = 0
        with pytest.raises(SpoolFull):
            while True:
                spool.append("insert", "t", {"n": "x" * 3000})
                accepted += 1
        # So many that their log would take the last room.
        cycle = Cycle(spool, ScriptedWriter(write_all), Policy(size=2, max_size=2))
        while cycle.turn(force=True):
            pass
        cycle.close()
        assert spool.conservation().written == accepted > 1000
        assert spool.append("insert", "t", {"n": "x" * 3000})


def test_a_disk_that_takes_half_of_the_first_page_is_full(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    write = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:1000], at))
        with pytest.raises(SpoolFull):
            Spool.open(state_dir / "test.spool")
    with closing(Spool.open(state_dir / "test.spool")) as spool:
        assert spool.append("insert", "t", {"n": 1})


def test_an_inbox_that_was_replaced_during_a_flush_keeps_what_it_holds(state_dir: Path):
    path = state_dir / "test.spool"
    with closing(Spool.open(path)) as spool:
        fill(spool, 10)
        later: list[int] = []

        def replace(batch: Batch, _: object) -> Outcome:
            Path(f"{path}.inbox").unlink()
            later.append(spool.append("insert", "t", {"n": 10}))
            return write_all(batch, _)

        cycle = Cycle(spool, ScriptedWriter(replace), Policy())
        assert cycle.turn(force=True)
        cycle.close()
        assert ids(spool) == later
        assert_law(spool)


def test_what_a_copy_accepts_first_is_not_taken_for_the_originals(state_dir: Path):
    original = Spool.open(state_dir / "test.spool")
    old = fill(original, 3)
    for file in list(state_dir.glob("test.spool*")):
        shutil.copyfile(file, file.with_name(file.name.replace("test", "copy")))
    original.close()
    with closing(Spool.open(state_dir / "copy.spool")) as copy:
        number = copy.append("insert", "t", {"n": 3})
        assert ids(copy) == [number]
        assert [letter.id for letter in copy.dead_letters()] == old
        assert_law(copy)


@pytest.mark.parametrize("what", ["deleted", "emptied"])
def test_an_inbox_that_is_gone_is_missed(
    state_dir: Path, what: str, caplog: pytest.LogCaptureFixture
):
    path = state_dir / "test.spool"
    with closing(Spool.open(path)) as spool:
        fill(spool, 3)
        spool.fold()
    assert not caplog.text
    inbox_path = Path(f"{path}.inbox")
    if what == "deleted":
        inbox_path.unlink()
    else:
        os.truncate(inbox_path, 0)
    with closing(Spool.open(path)) as spool:
        assert "lost" in caplog.text
        assert_law(spool)


def test_a_spool_that_was_emptied_is_missed(state_dir: Path, caplog: pytest.LogCaptureFixture):
    path = state_dir / "test.spool"
    with closing(Spool.open(path)) as spool:
        fill(spool, 3)
    os.truncate(path, 0)
    with closing(Spool.open(path)) as spool:
        assert "lost" in caplog.text
        assert spool.append("insert", "t", {"n": 3})
        assert_law(spool)


def test_an_id_that_is_damaged_stops_nobody(state_dir: Path):
    path = state_dir / "test.spool"
    with closing(Spool.open(path)) as spool:
        old = fill(spool, 2)
        spool.fold()
        with Path(f"{path}.inbox").open("r+b") as file:
            file.seek(16)
            file.write(b"\xff" * 8)
        assert ids(spool) == old
        assert spool.append("insert", "t", {"n": 3}) > old[-1]
        assert_law(spool)


def test_an_inbox_that_is_taken_away_again_and_again_is_a_spool_that_does_not_answer(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    path = state_dir / "test.spool"
    with closing(Spool.open(path)) as spool:
        begin_after = Inbox.begin_after

        def begin(self: Inbox, last_id: int) -> bool:
            found = begin_after(self, last_id)
            Path(f"{path}.inbox").unlink()
            return found

        spool.append("insert", "t", {"n": 1})
        with monkeypatch.context() as patch:
            patch.setattr(Inbox, "begin_after", begin)
            Path(f"{path}.inbox").unlink()
            with pytest.raises(SpoolError, match="again and again"):
                spool.append("insert", "t", {"n": 2})
        assert spool.append("insert", "t", {"n": 3})


def test_an_error_while_an_inbox_is_marked_leaves_it_to_be_closed(tmp_path: Path):
    inbox = Inbox(tmp_path / "inbox", sync=False, clock=time.time)
    with pytest.raises(UnicodeEncodeError):
        inbox.belong_to("é")
    inbox.close()
    assert inbox.owner() == ""
    inbox.close()


def test_an_inbox_that_cannot_be_begun_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    inbox = Inbox(tmp_path / "inbox", sync=False, clock=time.time)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(OSError, match="space"):
            inbox.bounds()
    assert len(os.listdir("/proc/self/fd")) == before
