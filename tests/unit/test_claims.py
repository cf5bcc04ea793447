"""Files are claimed by one process at a time, settled for good, and never lost or overwritten."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helena_cli.batch import claims
from helena_cli.batch.claims import Claimed, Claims, Unusable
from helena_cli.errors import HelenaError

LIMIT = 1000


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "REST", 0.0)
    monkeypatch.setattr(claims, "REST_EMPTY", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pending"
    path.mkdir()
    return path


def put(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).write_text(text)


def tree(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def settle(folder: Path, how: Callable[[Claims, Claimed], None], size: int = 10) -> list[str]:
    """Claim everything, do something to each, and return the names in their order."""
    seen = []
    with Claims(folder, "*.sql") as work:
        for batch in work.batches(size):
            for claimed in batch:
                seen.append(claimed.name)
                how(work, claimed)
    return seen


def read_and_finish(work: Claims, claimed: Claimed) -> None:
    work.read(claimed, LIMIT)
    work.done(claimed)


def test_files_are_claimed_by_name_in_batches_and_others_are_left_alone(folder: Path):
    put(folder, "b.sql", "a.sql", "c.sql", "note.txt", ".hidden.sql", "A.SQL")
    (folder / "folder.sql").mkdir()
    with Claims(folder, "*.sql") as work:
        assert work.count() == 3
        batches = work.batches(2)
        first = next(batches)
        assert [claimed.name for claimed in first] == ["a.sql", "b.sql"]
        assert tree(folder) == [
            ".hidden.sql",
            "A.SQL",
            "c.sql",
            "note.txt",
            "processing/a.sql",
            "processing/b.sql",
        ]
        for claimed in first:
            work.done(claimed)
        assert [claimed.name for claimed in next(batches)] == ["c.sql"]
    assert (folder / "processing").stat().st_mode & 0o777 == 0o700


def test_what_is_not_settled_goes_back(folder: Path):
    put(folder, "a.sql", "b.sql")
    with pytest.raises(KeyboardInterrupt), Claims(folder, "*.sql") as work:
        batch = next(work.batches(2))
        work.done(batch[0])
        raise KeyboardInterrupt
    assert tree(folder) == ["b.sql", "done/a.sql"]


def test_what_goes_back_does_not_overwrite_a_new_file_and_comes_first_next_time(folder: Path):
    put(folder, "b.sql", text="old")
    with Claims(folder, "*.sql") as work:
        next(work.batches(1))
        put(folder, "a.sql", "b.sql", text="new")
    assert tree(folder) == ["a.sql", "b.sql", "processing/b.sql"]
    contents: list[tuple[bytes, bool]] = []

    def note(work: Claims, claimed: Claimed) -> None:
        contents.append((work.read(claimed, LIMIT), claimed.leftover))
        work.done(claimed)

    assert settle(folder, note) == ["b.sql", "a.sql", "b.sql"]
    assert contents == [(b"old", True), (b"new", False), (b"new", False)]
    assert sorted(path.read_text() for path in (folder / "done").iterdir()) == ["new", "new", "old"]


def test_a_name_in_done_is_never_overwritten(folder: Path):
    for text in ("1", "2", "3"):
        put(folder, "a.sql", text=text)
        settle(folder, read_and_finish)
    assert sorted(path.read_text() for path in (folder / "done").iterdir()) == ["1", "2", "3"]
    assert all(path.suffix == ".sql" for path in (folder / "done").iterdir())


def test_a_failed_file_has_its_reason_beside_it(folder: Path):
    for text in ("first", "second"):
        put(folder, "a.sql", text=text)
        settle(folder, lambda work, one: work.failed(one, work.read(one, LIMIT).decode()))
    reasons = list((folder / "failed").glob("*.reason.txt"))
    assert sorted(path.read_text() for path in reasons) == ["first\n", "second\n"]
    for path in reasons:
        assert Path(str(path).removesuffix(".reason.txt")).read_text() == path.read_text().strip()


def test_a_reason_may_be_read_by_nobody_who_may_not_read_the_file(folder: Path):
    put(folder, "open.sql", "secret.sql")
    (folder / "secret.sql").chmod(0o600)
    settle(folder, lambda work, claimed: work.failed(claimed, "it holds 'secret'"))
    mode = (folder / "failed/secret.sql.reason.txt").stat().st_mode & 0o777
    assert mode == 0o600
    assert (folder / "failed/open.sql.reason.txt").stat().st_mode & 0o044


@pytest.mark.parametrize("name", ["é" * 125 + ".sql", "x" * 251 + ".sql"])
def test_the_longest_name_can_fail_twice(folder: Path, name: str):
    for _ in range(2):
        put(folder, name)
        assert settle(folder, lambda work, claimed: work.failed(claimed, "no")) == [name]
    assert len(tree(folder)) == 4


def test_a_name_that_is_not_utf8_is_worked_on_and_can_be_told(folder: Path):
    name = os.fsdecode(b"caf\xe9.sql")
    put(folder, name)
    with Claims(folder, "*.sql") as work:
        claimed = next(work.batches(1))[0]
        assert claimed.label == "caf\\xe9.sql"
        work.done(claimed)
    assert tree(folder) == [f"done/{name}"]


def test_a_new_file_waits_for_the_unsettled_one_of_its_name(folder: Path):
    (folder / "processing").mkdir()
    put(folder / "processing", "a.sql", text="old")
    put(folder, "a.sql", "b.sql", text="new")
    with Claims(folder, "*.sql") as work:
        batches = work.batches(10)
        assert [one.leftover for one in next(batches)] == [True]
        assert [one.name for one in next(batches)] == ["b.sql"]
    assert (folder / "processing/a.sql").read_text() == "old"
    assert (folder / "a.sql").read_text() == "new"


# What is no file to be read


def refusal(folder: Path) -> str:
    reasons = []

    def read(work: Claims, claimed: Claimed) -> None:
        try:
            work.read(claimed, LIMIT)
        except Unusable as why:
            reasons.append(str(why))
            work.failed(claimed, str(why))

    settle(folder, read)
    assert len(reasons) == 1
    return reasons[0]


def test_a_symbolic_link_is_refused_and_moved_itself(folder: Path, tmp_path: Path):
    put(tmp_path, "target")
    (folder / "a.sql").symlink_to(tmp_path / "target")
    assert "symbolic link" in refusal(folder)
    assert (folder / "failed/a.sql").is_symlink()
    assert (tmp_path / "target").exists()


def test_a_pipe_is_refused_without_waiting_for_its_writer(folder: Path):
    os.mkfifo(folder / "a.sql")
    assert "not a regular file" in refusal(folder)


def test_a_file_over_the_limit_is_refused_unread(folder: Path):
    put(folder, "a.sql", text="x" * (LIMIT + 1))
    assert refusal(folder) == "it has more than 1,000 bytes"
    put(folder, "b.sql", text="x" * LIMIT)
    assert settle(folder, read_and_finish) == ["b.sql"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(folder: Path):
    put(folder, "a.sql")
    (folder / "a.sql").chmod(0)
    assert "Permission denied" in refusal(folder)


def test_a_file_that_was_exchanged_for_a_link_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put(tmp_path, "secret")
    put(folder, "a.sql")
    look = os.lstat

    def exchange(path: str, *, dir_fd: int) -> os.stat_result:
        status = look(path, dir_fd=dir_fd)
        (folder / "processing/a.sql").unlink()
        (folder / "processing/a.sql").symlink_to(tmp_path / "secret")
        return status

    with Claims(folder, "*.sql") as work:
        batch = next(work.batches(1))
        with monkeypatch.context() as patch, pytest.raises(Unusable):
            patch.setattr(os, "lstat", exchange)
            work.read(batch[0], LIMIT)


def test_a_file_that_vanishes_harms_nobody(folder: Path):
    put(folder, "a.sql", "b.sql", "c.sql")
    with Claims(folder, "*.sql") as work:
        batches = work.batches(1)
        gone = next(batches)[0]
        (folder / "processing/a.sql").unlink()
        with pytest.raises(Unusable, match="No such file"):
            work.read(gone, LIMIT)
        work.failed(gone, "gone")
        (folder / "b.sql").unlink()
        assert [claimed.name for claimed in next(batches)] == ["c.sql"]
    assert tree(folder) == ["c.sql"]


def test_a_file_that_is_still_written_to_is_put_back(folder: Path):
    put(folder, "a.sql", text="INSERT")
    with (folder / "a.sql").open("a") as writer, Claims(folder, "*.sql") as work:
        claimed = next(work.batches(1))[0]
        assert work.read(claimed, LIMIT) == b"INSERT"
        writer.write(" INTO")
        writer.flush()
        work.failed(claimed, "it ends too early")
    assert tree(folder) == ["a.sql"]
    assert (folder / "a.sql").read_text() == "INSERT INTO"


def test_a_file_that_was_just_written_to_is_left_to_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(claims, "REST", 3.0)
    monkeypatch.setattr(claims, "REST_EMPTY", 5.0)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    put(folder, "old.sql")
    os.utime(folder / "old.sql", (0, 0))
    os.mkfifo(folder / "pipe.sql")
    settle(folder, lambda work, one: work.done(one))
    put(folder, "young.sql")
    settle(folder, lambda work, one: work.done(one))
    put(folder, "empty.sql", text="")
    # By a clock that is wrong.
    os.utime(folder / "empty.sql", (time.time() + 1000,) * 2)
    settle(folder, lambda work, one: work.done(one))
    assert waits[0] == 0
    assert 0 < waits[1] <= 3
    assert waits[2] == 5


# The folder itself


def test_an_absent_folder_is_empty_and_stays_absent(folder: Path):
    with Claims(folder / "absent", "*.sql") as work:
        assert work.count() == 0
        assert list(work.batches(1)) == []
    assert list(folder.iterdir()) == []


def test_a_folder_without_files_is_left_as_it_is(folder: Path):
    put(folder, "note.txt")
    assert settle(folder, read_and_finish) == []
    assert [path.name for path in folder.iterdir()] == ["note.txt"]


def test_a_dry_run_sees_everything_and_touches_nothing(folder: Path):
    put(folder, "a.sql", text="new")
    (folder / "processing").mkdir()
    put(folder / "processing", "b.sql", text="old")
    before = tree(folder)
    with Claims(folder, "*.sql", dry_run=True) as work:
        assert work.count() == 2
        files = [claimed for batch in work.batches(10) for claimed in batch]
        assert [work.read(claimed, LIMIT) for claimed in files] == [b"old", b"new"]
        assert [str(claimed.path.relative_to(folder)) for claimed in files] == [
            "processing/b.sql",
            "a.sql",
        ]
        work.done(files[0])
        work.failed(files[1], "no")
    assert tree(folder) == before
    assert not (folder / "processing/.lock").exists()


@pytest.mark.parametrize("place", ["processing", "done"])
def test_a_subfolder_that_is_a_link_is_refused(folder: Path, tmp_path: Path, place: str):
    put(folder, "a.sql")
    (tmp_path / "elsewhere").mkdir()
    (folder / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HelenaError, match=f"{place}: Not a directory"):
        settle(folder, read_and_finish)
    assert tree(folder) == ["a.sql"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused_with_its_name(folder: Path):
    put(folder, "a.sql")
    with pytest.raises(HelenaError, match=r"a\.sql.*Not a directory") as refused:
        settle(folder / "a.sql", read_and_finish)
    assert "[pending]" in refused.value.remedy


# Two processes


def test_only_one_works_on_a_folder_at_a_time(folder: Path):
    put(folder, "a.sql")
    with (
        Claims(folder, "*.sql"),
        pytest.raises(HelenaError, match="Another Helena process"),
        Claims(folder, "*.sql", wait=0.1),
    ):
        pass
    assert settle(folder, read_and_finish) == ["a.sql"]


HOLDER = """
import sys
import time
from pathlib import Path
from helena_cli.batch import claims
from helena_cli.batch.claims import Claims
with Claims(Path(sys.argv[1]), "*.sql") as work:
    next(work.batches(2))
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_had_claimed_is_found_first(folder: Path):
    put(folder, "b.sql", "c.sql", "d.sql")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"claimed\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    put(folder, "a.sql")
    assert tree(folder) == ["a.sql", "d.sql", "processing/b.sql", "processing/c.sql"]
    assert settle(folder, read_and_finish) == ["b.sql", "c.sql", "a.sql", "d.sql"]
    assert tree(folder) == [f"done/{name}.sql" for name in "abcd"]
