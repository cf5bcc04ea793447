"""Full disks and forbidden directories."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from helena_cli.batch.lease import Lease
from helena_cli.batch.spool import Spool
from helena_cli.batch.spoolfile import SpoolFile
from helena_cli.errors import SpoolFull, SpoolUnavailable
from tests.spools import assert_law, fill, ids, settle

MIB = 1024 * 1024

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="Only root can mount and become others.")


@pytest.fixture
def disk(state_dir: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", state_dir], capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    yield state_dir
    subprocess.run(["umount", state_dir], check=True)


def fill_disk(disk: Path) -> Path:
    """Take all the room that is left."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk never became full")


def append_until_full(spool: Spool) -> list[int]:
    accepted = []
    try:
        while True:
            accepted.append(spool.append("insert", "t", {"a": "x" * 3000}))
    except SpoolFull as error:
        assert "disk" in str(error)
        assert "Free some space" in error.remedy
    return accepted


@needs_root
def test_full_disk_refuses_and_everything_accepted_is_kept(disk):
    with closing(Spool.open(disk / "test.spool")) as spool:
        first = fill(spool, 10)
        spool.fold()
        ballast = fill_disk(disk)
        accepted = append_until_full(spool)
        with pytest.raises(SpoolFull):
            spool.extend(("insert", "t", {"a": "x" * 3000}) for _ in range(100))
        # What is in the tables can still be seen.
        assert ids(spool)[:10] == first
        ballast.unlink()
        assert ids(spool) == [*first, *accepted]
        later = spool.append("insert", "t", {"a": "x" * 3000})
        assert ids(spool)[-1] == later
        assert_law(spool)


@needs_root
def test_disk_that_the_spool_itself_filled_can_be_read_and_goes_on_later(disk):
    with closing(Spool.open(disk / "test.spool")) as spool:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(5 * MIB))
        accepted = append_until_full(spool)
        assert spool.queue().total >= 0
        ballast.unlink()
        assert ids(spool) == accepted
        assert_law(spool)


@needs_root
def test_full_disk_does_not_keep_the_flusher_from_settling(disk):
    """The log is large enough for it once it is folded, and nobody else frees the room."""
    file = SpoolFile(disk / "test.spool", durability="process")
    with closing(Spool.open(disk / "test.spool")) as spool, closing(file):
        spool.extend(("insert", "t", {"a": "x" * 1000}) for _ in range(1500))
        spool.fold()
        file.checkpoint(at_least=0)
        fill_disk(disk)
        accepted = 0
        while ids(spool):
            accepted += len(spool.extend([("insert", "u", {"a": 1})]))
            taken = spool.take(limit=100, max_bytes=MIB)
            settle(spool, [operation.id for operation in taken], tables=["t", "u"])
        assert accepted == spool.conservation().accepted - 1500
        assert spool.queue().spool_bytes < MIB
        assert_law(spool)


@needs_root
def test_spool_on_a_full_disk_is_not_opened_with_a_clear_reason(disk):
    fill_disk(disk)
    with pytest.raises(SpoolFull) as caught:
        Spool.open(disk / "test.spool")
    assert "Free some space" in caught.value.remedy


@needs_root
def test_spool_that_exists_opens_on_a_full_disk_when_there_is_room_again(disk):
    with closing(Spool.open(disk / "test.spool")) as spool:
        numbers = fill(spool, 10)
    ballast = fill_disk(disk)
    try:
        Spool.open(disk / "test.spool").close()
    except SpoolFull:
        ballast.unlink()
    with closing(Spool.open(disk / "test.spool")) as spool:
        assert ids(spool) == numbers


@needs_root
def test_damaged_spool_on_a_full_disk_is_repaired_when_there_is_room_again(disk):
    with closing(Spool.open(disk / "test.spool")) as spool:
        spool.extend(("insert", "t", {"a": "x" * 1000}) for _ in range(1000))
        identity = spool.id
    ballast = fill_disk(disk)
    with (disk / "test.spool").open("r+b") as file:
        file.seek(100 * 4096)
        file.write(bytes(4096))
    with pytest.raises(SpoolFull), closing(Spool.open(disk / "test.spool")) as spool:
        spool.take(limit=10_000, max_bytes=1 << 30)
    ballast.unlink()
    with closing(Spool.open(disk / "test.spool")) as spool:
        taken = spool.take(limit=10_000, max_bytes=1 << 30)
        assert spool.id == identity
        assert len(taken) + spool.lost() == 1000
        assert len(taken) > 900
        assert_law(spool)


def as_nobody(code: str, *arguments: Path) -> str:
    """Run a snippet as another user; what it printed."""
    script = (
        "import os, sys; sys.path.insert(0, os.getcwd()); from pathlib import Path;"
        "from helena_cli.batch.lease import Lease; from helena_cli.batch.spool import Spool;"
        "from helena_cli.errors import SpoolUnavailable\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "path = Path(sys.argv[1])\n"
        f"try:\n    {code}\n"
        "except SpoolUnavailable as error:\n    print(error, '|', error.remedy)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return answer.stdout


@needs_root
@pytest.mark.parametrize("mode", [0o755, 0o700])
@pytest.mark.parametrize(
    "code",
    [
        "Spool.open(path).append('insert', 't', {'a': 1})",
        "Lease(path.with_suffix('.lease')).acquire()",
        "Lease(path.with_suffix('.lease')).held_by_anyone()",
    ],
)
def test_directory_of_somebody_else_is_refused_with_the_remedy(state_dir, mode, code):
    state_dir.chmod(mode)
    printed = as_nobody(code, state_dir / "test.spool")
    assert "Permission denied" in printed
    assert "HELENA_STATE_DIR" in printed


@needs_root
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", ".gate", ".inbox"])
def test_file_of_somebody_else_is_refused_with_the_remedy(state_dir, suffix):
    path = state_dir / "test.spool"
    state_dir.chmod(0o777)
    spool = Spool.open(path)
    spool.append("insert", "t", {"a": 1})
    spool.queue()
    for other in ("", "-wal", "-shm", ".gate", ".inbox"):
        if other != suffix:
            os.chown(f"{path}{other}", 65534, 65534)
    printed = as_nobody(
        "spool = Spool.open(path); spool.queue(); spool.append('insert', 't', {'a': 1})", path
    )
    assert "cannot be used" in printed
    assert "HELENA_STATE_DIR" in printed
    spool.close()


@needs_root
def test_read_only_file_system_is_refused_with_the_remedy(disk):
    with closing(Spool.open(disk / "test.spool")) as spool:
        fill(spool, 1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(SpoolUnavailable) as caught:
        Spool.open(disk / "test.spool")
    assert "HELENA_STATE_DIR" in caught.value.remedy
    with pytest.raises(SpoolUnavailable):
        Lease(disk / "test.lease").acquire()


def test_log_that_cannot_grow_is_an_error_and_nothing_is_lost(state_dir):
    """Without root: a limit on the size of a file. SQLite calls it an error of the disk."""
    path = state_dir / "test.spool"
    script = (
        "import json, resource, sys; from pathlib import Path;"
        "from helena_cli.batch.spool import Spool; from helena_cli.errors import SpoolError\n"
        "spool = Spool.open(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "accepted = []\n"
        "try:\n"
        "    while True:\n"
        "        accepted.append(spool.append('insert', 't', {'a': 'x' * 3000}))\n"
        "        spool.queue()\n"
        "except SpoolError as error:\n"
        "    print(json.dumps(accepted))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    import json

    accepted = json.loads(answer.stdout)
    assert len(accepted) > 10
    with closing(Spool.open(path)) as spool:
        assert ids(spool)[: len(accepted)] == accepted
        assert_law(spool)
