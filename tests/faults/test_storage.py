"""The disk under the queue fails: full, read-only, with errors, damaged, lost, restored, copied.

What is promised. Of what was accepted nothing is ever written twice, and what was refused is never
written. A disk that is full, read-only or reports errors loses nothing. Files that are damaged or
lost cost what was in them, no more, and the loss is counted or said; but of SQLite's log the part
from the damage on is gone without a word, as after a power cut. After an earlier copy came
back, nothing is passed over in silence: a lane that cannot know waits and says why. A power cut may
take the last moments with `durability = "process"`, and nothing with "power".
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from pathlib import Path

import pytest

from tests.hosts import Host, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]

PAGE = 4096
MIB = 1024 * 1024

#: Adds numbers and notes which were accepted, and how many were refused; no refusal ends it.
PRODUCE = """
import os, sys
from pathlib import Path
from helena_cli import add_operation, add_operations
from helena_cli.errors import SpoolError
first, count, end = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
accepted = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
refused = os.open(sys.argv[5], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in range(first, first + count):
    if end.exists():
        break
    try:
        add_operation("insert", "numbers", {"n": n, "note": "x" * (n % 7 * 300)})
        os.write(accepted, b"%d\\n" % n)
    except SpoolError as error:
        assert error.remedy
        os.write(refused, b"%d\\n" % n)
"""

#: Leaves a queue in each folder as a killed process does: some written, some in the tables, some in
#: the inbox.
LEAVE = """
import os, sys
from helena_cli import config
from helena_cli.runtime import Runtime
def add(first):
    return [("insert", "numbers", {"n": n, "note": "x" * 150}) for n in range(first, first + 20)]
for number, folder in enumerate(sys.argv[2:]):
    os.mkdir(folder, 0o700)
    runtime = Runtime(config.load(environ={**os.environ, "HELENA_STATE_DIR": folder}))
    first = int(sys.argv[1]) + number * 1000
    runtime.engine.extend(add(first))
    assert runtime.engine.flush(60)
    runtime.engine.close()
    runtime.spool.extend(add(first + 20))
    runtime.spool.fold()
    runtime.spool.extend(add(first + 40))
os._exit(0)
"""


ADD = """
import sys
from helena_cli import add_operation
for n in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
    add_operation("insert", "numbers", {"n": n})
"""


class Notes:
    """What the producers of a host were told, kept outside of Helena's disk."""

    def __init__(self, folder: Path) -> None:
        self.end, self._accepted, self._refused = (folder / n for n in ("end", "yes", "no"))

    def arguments(self, first: int, count: int) -> tuple[object, ...]:
        return first, count, self.end, self._accepted, self._refused

    def accepted(self) -> list[int]:
        return _numbers(self._accepted)

    def refused(self) -> list[int]:
        return _numbers(self._refused)


def _numbers(path: Path) -> list[int]:
    return sorted(map(int, path.read_text().split())) if path.exists() else []


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


@pytest.fixture
def disk(state_dir: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("Only root can mount.")
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(state_dir)]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"No file system can be mounted here: {mount.stderr.strip()}")
    yield state_dir
    subprocess.run(["umount", state_dir], check=True)


def drain(host: Host, **variables: str) -> None:
    with host.runtime(**variables) as runtime:
        assert runtime.engine.flush(60), runtime.engine.failure


def assert_kept_word(host: Host, notes: Notes, figures: Counter[str]) -> None:
    """Each accepted number is there once, and no other."""
    drain(host)
    assert host.numbers() == notes.accepted()
    law = host.law()
    assert (law.spooled, law.dead) == (0, 0), law
    figures["operations checked: disks"] += len(notes.accepted())
    figures["operations refused and told: disks"] += len(notes.refused())


def take_all_room(disk: Path) -> Path:
    """A file that leaves no room for others."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk never became full")


def _await_more(noted: Callable[[], Sized], known: int, what: str) -> None:
    # After several failures the flusher waits up to a minute before it tries again.
    wait_until(lambda: len(noted()) > known, what, limit=90)


def test_a_disk_that_is_full_again_and_again_loses_nothing_it_accepted(
    disk: Path, host: Host, notes: Notes, minutes: float, seed: int, figures: Counter[str]
):
    chance = random.Random(seed)
    deadline = time.monotonic() + minutes * 60
    with host.start(PRODUCE, *notes.arguments(0, 10**9)) as process:
        try:
            rounds = 0
            while rounds < 3 or time.monotonic() < deadline:
                rounds += 1
                known, told = len(notes.accepted()), len(notes.refused())
                _await_more(notes.accepted, known + 100, "room")
                ballast = take_all_room(disk)
                _await_more(notes.refused, told, "a refusal")
                time.sleep(chance.uniform(0, 0.5))
                ballast.unlink()
            notes.end.touch()
            _, errors = process.communicate(timeout=60)
        finally:
            # Without effect unless it hangs.
            process.kill()
        assert process.returncode == 0, errors
    figures["failing disks survived: full"] += rounds
    assert_kept_word(host, notes, figures)


def test_a_read_only_disk_refuses_and_keeps_what_is_queued(
    disk: Path, host: Host, notes: Notes, figures: Counter[str]
):
    away = {"HELENA_DSN": make_away(host), "HELENA_BATCH_SHUTDOWN_TIMEOUT": "0.5"}
    assert host.run(PRODUCE, *notes.arguments(0, 30), **away).returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert host.run(PRODUCE, *notes.arguments(30, 3)).returncode == 0
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert notes.refused() == [30, 31, 32]
    assert_kept_word(host, notes, figures)


def make_away(host: Host) -> str:
    """The address of the host's database with a password that is of no use there."""
    return f"{host.variables['HELENA_DSN']} options='-c no_such_parameter=1'"


#: The calls of the system that write, and what they may answer.
FAULTS = [
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("fsync", "EIO"),
    ("fdatasync", "EIO"),
    ("ftruncate", "EIO"),
]


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_disk_with_errors_loses_nothing_it_accepted(
    host: Host, notes: Notes, durability: str, minutes: float, seed: int, figures: Counter[str]
):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed.")
    chance = random.Random(seed)
    deadline, first = time.monotonic() + minutes * 30, 0
    host.variables |= {"HELENA_SPOOL_DURABILITY": durability}
    assert host.run(PRODUCE, *notes.arguments(0, 1)).returncode == 0
    while first < 3 * 200 or time.monotonic() < deadline:
        call, error = chance.choice(FAULTS)
        when = f"{chance.randrange(1, 30)}+{chance.randrange(5, 40)}"
        tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        tracer += ["-e", f"inject={call}:error={error}:when={when}"]
        for suffix in ("", "-wal", ".inbox"):
            tracer += ["-P", f"{host.spools()[0]}{suffix}"]
        (script,) = host.state_dir.glob("script_*.py")
        tracer += [sys.executable, str(script), *map(str, notes.arguments(first + 1, 200))]
        environment = host.variables | {"HELENA_BATCH_SHUTDOWN_TIMEOUT": "2"}
        result = subprocess.run(
            tracer, env=environment, capture_output=True, text=True, timeout=100
        )
        assert result.returncode == 0, result.stderr
        first += 200
        figures["failing disks survived: errors of a call"] += 1
    assert_kept_word(host, notes, figures)


def test_damage_of_any_page_doubles_nothing_and_says_what_it_cost(
    host: Host,
    tmp_path: Path,
    minutes: float,
    seed: int,
    figures: Counter[str],
    caplog: pytest.LogCaptureFixture,
):
    chance = random.Random(seed)
    deadline, rounds = time.monotonic() + minutes * 60, 0
    while not rounds or time.monotonic() < deadline:
        folders = [tmp_path / f"{rounds}-{number}" for number in range(12)]
        assert host.run(LEAVE, rounds * 100_000, *folders).returncode == 0
        for number, folder in enumerate(folders):
            caplog.clear()
            damaged = damage(folder, chance)
            missing = missing_after(host, folder, rounds * 100_000 + number * 1000)
            # SQLite takes a log as far as it is whole, and says nothing.
            assert not missing or "lost" in caplog.text or damaged.name.endswith("-wal"), missing
            figures["failing disks survived: damaged files"] += 1
        rounds += 1
    assert len(set(host.numbers())) == len(host.numbers())


def damage(folder: Path, chance: random.Random) -> Path:
    """Replace a page by zeros or noise, or the rest of the file by nothing; which file it was."""
    file = chance.choice([p for p in folder.glob("*.spool*") if p.stat().st_size >= PAGE])
    page = chance.randrange(file.stat().st_size // PAGE)
    content = chance.choice([bytes(PAGE), chance.randbytes(PAGE), chance.randbytes(100), None])
    with file.open("r+b") as target:
        target.seek(page * PAGE)
        if content is None:
            target.truncate()
        else:
            target.write(content)
    return file


def missing_after(host: Host, folder: Path, first: int) -> set[int]:
    """What is not written, nor dead, nor waits with a reason; all else is looked after."""
    with host.runtime(HELENA_STATE_DIR=str(folder)) as runtime:
        runtime.engine.add_operation("insert", "numbers", {"n": first + 60})
        assert runtime.engine.flush(60), runtime.engine.failure
        spool = runtime.spool
        letters = [json.loads(letter.data)["n"] for letter in spool.dead_letters()]
        queued = {lane.table: lane for lane in spool.lanes()}
        waiting = [json.loads(o.data)["n"] for table in queued for o in spool.queued(table)]
        law = spool.conservation()
    assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled
    assert all(lane.reason for lane in queued.values())
    written = [n for n in host.numbers() if first <= n < first + 1000]
    assert len(written) == len(set(written))
    assert not set(written) & set(waiting)
    assert first + 60 in {*written, *waiting}
    return {*range(first, first + 60)} - {*written, *letters, *waiting}


@pytest.mark.parametrize(
    "suffixes",
    [("",), (".inbox",), ("", "-wal"), ("", "-wal", ".inbox"), ("-wal", "-shm", ".inbox")],
    ids="+".join,
)
@pytest.mark.parametrize("what", ["restored", "dropped"])
def test_files_from_before_or_gone_pass_over_nothing_in_silence(
    host: Host, tmp_path: Path, what: str, suffixes: tuple[str, ...]
):
    assert host.run(LEAVE, 0, host.state_dir / "state").returncode == 0
    host.state_dir = host.state_dir / "state"
    host.variables["HELENA_STATE_DIR"] = str(host.state_dir)
    copies = tmp_path / "copies"
    shutil.copytree(host.state_dir, copies)
    assert host.run(ADD, 60, 20).returncode == 0
    for file in [Path(f"{host.spools()[0]}{suffix}") for suffix in suffixes]:
        if what == "restored" and (copies / file.name).exists():
            # Into the file that is there, as `cp` does: another one would be a copy.
            shutil.copyfile(copies / file.name, file)
        elif what == "dropped":
            file.unlink(missing_ok=True)
    result = host.run(ADD, 100, 20)
    assert result.returncode == 0, result.stderr
    with host.runtime() as runtime:
        assert runtime.engine.flush(60)
        lanes = [lane for lane in runtime.spool.lanes() if lane.operations]
        waiting = [json.loads(o.data)["n"] for o in runtime.spool.queued("numbers")]
    assert all(lane.reason for lane in lanes)
    numbers = host.numbers()
    assert len(numbers) == len(set(numbers))
    assert {*range(80)} <= set(numbers), "what the database had is still there"
    assert {*range(100, 120)} <= {*numbers, *waiting}
    host.law()


def test_a_machine_that_goes_on_from_an_older_picture_passes_over_nothing_in_silence(
    host: Host, tmp_path: Path
):
    def put_back(picture: Path) -> None:
        # Into the files that are there: of a machine that is copied as a whole nothing else tells.
        for file in picture.glob("*.spool*"):
            shutil.copyfile(file, host.state_dir / file.name)

    assert host.run(ADD, 0, 20).returncode == 0
    shutil.copytree(host.state_dir, tmp_path / "first")
    with host.runtime() as runtime:
        runtime.spool.extend(("insert", "numbers", {"n": n}) for n in range(20, 40))
    shutil.copytree(host.state_dir, tmp_path / "second")
    put_back(tmp_path / "first")
    # Under later ids than those of the twin, which the database never got.
    assert host.run(ADD, 40, 20).returncode == 0
    assert host.numbers() == [*range(20), *range(40, 60)]
    put_back(tmp_path / "second")
    with host.runtime() as runtime:
        assert runtime.engine.flush(60)
        (lane,) = runtime.spool.lanes()
        assert lane.reason and "copy" in lane.reason
        waiting = [json.loads(o.data)["n"] for o in runtime.spool.queued("numbers")]
        assert waiting == [*range(20, 40)]
        runtime.spool.renew_identity("it was asked for")
        runtime.spool.retry(letter.id for letter in runtime.spool.dead_letters())
        assert runtime.engine.flush(60), runtime.engine.failure
    assert host.numbers() == [*range(60)]


def test_a_copy_in_a_second_state_directory_writes_nothing_of_the_original(
    host: Host, tmp_path: Path
):
    original, copy = tmp_path / "original", tmp_path / "copy"
    assert host.run(LEAVE, 0, original).returncode == 0
    shutil.copytree(original, copy)
    for folder, number in ((copy, 60), (original, 61)):
        with host.runtime(HELENA_STATE_DIR=str(folder)) as runtime:
            runtime.engine.add_operation("insert", "numbers", {"n": number})
            assert runtime.engine.flush(60), runtime.engine.failure
            dead = len(runtime.spool.dead_letters())
        assert dead == (40 if folder == copy else 0)
    assert host.numbers() == list(range(62))
