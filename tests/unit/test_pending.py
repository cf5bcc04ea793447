"""Files that programs left: taken in once, put away, and never in the way of the next one."""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helena_cli.batch.spool import Spool
from helena_cli.documents import pending
from helena_cli.documents.json_files import JsonFiles, PendingReport
from helena_cli.documents.reconcile import Failure, Report
from helena_cli.documents.tasks import Tasks
from helena_cli.errors import SpoolFull
from helena_cli.settings import DocumentSettings
from tests.spools import assert_law

LONG_AGO = 1_700_000_000


def message(**data: Any) -> dict[str, Any]:
    """The content of an operation file."""
    return {"type": "message", "data": {"sender": "a", "content": "b", **data}}


MESSAGE = message()


@pytest.fixture
def spool(state_dir: Path) -> Iterator[Spool]:
    with closing(Spool.open(state_dir / "test.spool")) as spool:
        yield spool
        assert_law(spool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "helena_batch_pending"
    path.mkdir()
    return path


def leave(folder: Path, name: str, content: object, *, at: float = LONG_AGO) -> Path:
    """A file of that time; anything but text and bytes is written as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, (at, at))
    return path


def drain(folder: Path, spool: pending.Spool, **options: Any) -> PendingReport:
    return pending.drain_operation_files(
        folder, spool, **{"max_bytes": 10_000, "sleep": never, **options}
    )


def never(_: float) -> None:
    raise AssertionError("nothing is to be waited for")


def names(folder: Path) -> list[str]:
    """The files in a folder; none when it is not there."""
    return sorted(p.name for p in folder.glob("*") if p.is_file() or p.is_symlink())


def counts(report: PendingReport) -> tuple[int, int, int, int]:
    assert report.failed == len(report.failures)
    return report.found, report.accepted, report.failed, report.skipped


def contents(spool: Spool, table: str = "messages") -> list[Any]:
    return [json.loads(operation.data)["content"] for operation in spool.queued(table)]


# Operation files


@pytest.mark.parametrize(
    ("kind", "table", "data"),
    [
        ("document_reference", "es_document_references", {"es_doc_id": "a", "tags": ["x"]}),
        ("message", "messages", {"id": "m", "sender": "a", "content": "ü"}),
        (
            "agent_context",
            "agent_contexts",
            {"agent_name": "a", "project_id": "b", "context_key": "c", "context_value": [1.10]},
        ),
    ],
)
def test_an_operation_file_becomes_its_operation_and_is_put_away(
    spool: Spool, folder: Path, kind: str, table: str, data: Mapping[str, Any]
):
    leave(folder, "one.json", {"type": kind, "data": data, "priority": "high"})
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)
    (operation,) = spool.queued(table)
    assert operation.kind == ("message" if kind == "message" else "insert")
    assert json.loads(operation.data).items() >= data.items()
    assert (names(folder), names(folder / "done")) == ([], ["one.json"])


def test_a_record_is_of_the_time_when_its_file_was_written(spool: Spool, folder: Path):
    leave(folder, "one.json", MESSAGE)
    drain(folder, spool)
    (operation,) = spool.queued("messages")
    assert json.loads(operation.data)["timestamp"] == "2023-11-14T22:13:20Z"


def test_files_are_accepted_in_the_order_of_their_names(spool: Spool, folder: Path):
    for number in (3, 1, 2):
        leave(folder, f"{number}.json", message(content=str(number)))
    drain(folder, spool)
    assert contents(spool) == ["1", "2", "3"]


def test_a_second_run_accepts_nothing(spool: Spool, folder: Path):
    for number in range(5):
        leave(folder, f"{number}.json", MESSAGE)
    assert counts(drain(folder, spool)) == (5, 5, 0, 0)
    assert counts(drain(folder, spool)) == (0, 0, 0, 0)
    assert spool.queue().total == 5


def test_other_files_are_left_alone(spool: Spool, folder: Path):
    leave(folder, "one.txt", MESSAGE)
    leave(folder, ".hidden.json", MESSAGE)
    (folder / "sub.json").mkdir()
    assert counts(drain(folder, spool)) == (0, 0, 0, 0)
    assert names(folder) == [".hidden.json", "one.txt"]


def test_an_absent_folder_is_empty_and_stays_absent(spool: Spool, tmp_path: Path):
    assert counts(drain(tmp_path / "nowhere", spool)) == (0, 0, 0, 0)
    assert not (tmp_path / "nowhere").exists()


def test_a_byte_order_mark_does_no_harm(spool: Spool, folder: Path):
    leave(folder, "one.json", b"\xef\xbb\xbf" + json.dumps(MESSAGE).encode())
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is not valid JSON"),
        ("{", "it is not valid JSON"),
        ('{"type": "message"} x', "it is not valid JSON"),
        (b'{"type": "\xff"}', "it is not UTF-8"),
        ('{"type": "\\ud800"}', "it is not valid JSON"),
        ("[" * 100_000, "has more than 10,000 bytes"),
        ("[" * 9_000, "it is nested too deeply"),
        ("[]", "but not an object"),
        ("{}", "type: None is not one of document_reference, message, agent_context"),
        ({"type": "mesage", "data": {}}, "Did you mean 'message'?"),
        ({"type": ["message"], "data": {}}, "type: ['message'] is not one of"),
        ({"type": "message"}, "data: it must map fields to values"),
        ({"type": "message", "data": []}, "data: it must map fields to values"),
        ({"type": "message", "data": {"sender": "a"}}, "content: it is required"),
        (message(colour="red"), "it has no field 'colour'"),
        (message(tags="a,b"), "tags: it must be a list"),
        (message(context="{}"), "context: it is JSON"),
        (message(content="a\0b"), "content: PostgreSQL stores no NUL character"),
        (message(content="x" * 10_000), "has more than 10,000 bytes"),
    ],
)
def test_a_bad_file_goes_aside_with_the_reason_and_the_others_are_accepted(
    spool: Spool, folder: Path, content: object, reason: str
):
    bad = leave(folder, "bad.json", content)
    leave(folder, "good.json", MESSAGE)
    report = drain(folder, spool)
    assert counts(report) == (2, 1, 1, 0)
    assert report.failures[0].path == str(bad)
    assert reason in report.failures[0].reason
    assert names(folder) == []
    assert names(folder / "failed") == ["bad.json", "bad.json.reason.txt"]
    assert reason in (folder / "failed" / "bad.json.reason.txt").read_text()
    assert contents(spool) == ["b"]


def test_a_symbolic_link_is_not_followed(spool: Spool, folder: Path, tmp_path: Path):
    secret = leave(tmp_path, "secret", MESSAGE)
    (folder / "link.json").symlink_to(secret)
    report = drain(folder, spool)
    assert counts(report) == (1, 0, 1, 0)
    assert "symbolic link" in report.failures[0].reason
    assert secret.exists()


def test_a_dry_run_says_the_same_and_moves_and_queues_nothing(spool: Spool, folder: Path):
    leave(folder, "good.json", MESSAGE)
    leave(folder, "bad.json", "{")
    leave(folder, "nul.json", message(content="\0"))
    leave(folder, "new.json", "{", at=time.time())
    assert counts(drain(folder, spool, dry_run=True)) == (4, 1, 3, 0)
    assert names(folder) == ["bad.json", "good.json", "new.json", "nul.json"]
    assert [p.name for p in folder.iterdir() if p.is_dir()] == []
    assert spool.conservation().accepted == 0


# Files that are still being written


class Time:
    """A clock that a sleep moves on; something may happen meanwhile."""

    def __init__(self, meanwhile: Callable[[float], object]) -> None:
        self.slept = 0.0
        self._meanwhile = meanwhile

    def __call__(self) -> float:
        return time.time() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self._meanwhile(self())


def drain_at(clock: Time, folder: Path, spool: Spool) -> PendingReport:
    return drain(folder, spool, clock=clock, sleep=clock.sleep)


def test_a_file_that_is_being_written_is_waited_for(spool: Spool, folder: Path):
    leave(folder, "new.json", '{"type": "message", "da', at=time.time())
    leave(folder, "good.json", MESSAGE)
    clock = Time(lambda now: leave(folder, "new.json", message(content="new"), at=now))
    assert counts(drain_at(clock, folder, spool)) == (2, 2, 0, 0)
    assert contents(spool) == ["b", "new"]


def test_a_file_that_nobody_completes_is_bad(spool: Spool, folder: Path):
    leave(folder, "new.json", "{", at=time.time())
    assert counts(drain_at(Time(lambda now: None), folder, spool)) == (1, 0, 1, 0)
    assert names(folder / "failed") == ["new.json", "new.json.reason.txt"]


def test_a_file_that_is_still_being_written_is_left_for_the_next_run(spool: Spool, folder: Path):
    leave(folder, "new.json", "{", at=time.time())
    clock = Time(lambda now: leave(folder, "new.json", '{"type"', at=now))
    assert counts(drain_at(clock, folder, spool)) == (1, 0, 0, 1)
    assert names(folder) == ["new.json"]


def test_a_file_that_was_handed_out_is_not_handed_out_again_meanwhile(folder: Path):
    leave(folder, "good.json", MESSAGE)
    leave(folder, "new.json", "{", at=time.time())
    clock = Time(lambda now: leave(folder, "new.json", MESSAGE, at=now))
    with JsonFiles(folder, max_bytes=10_000, clock=clock, sleep=clock.sleep) as files:
        assert [file.name for file, _ in files.read()] == ["good.json", "new.json"]


# Once, whatever happens


class Dies(Exception):
    """In place of a kill."""


class DyingSpool:
    """A spool whose process dies right after, or right before, one of its methods."""

    def __init__(self, spool: Spool, method: str, *, before: bool = False) -> None:
        self._spool = spool
        self._method = method
        self._before = before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._spool, name)
        if name != self._method:
            return method

        def dying(*arguments: Any) -> None:
            if not self._before:
                method(*arguments)
            raise Dies

        return dying


def test_a_run_that_dies_after_accepting_leaves_a_file_that_is_not_accepted_again(
    spool: Spool, folder: Path
):
    leave(folder, "1.json", MESSAGE)
    leave(folder, "2.json", MESSAGE)
    with pytest.raises(Dies):
        drain(folder, DyingSpool(spool, "accept_file"))
    assert spool.queue().total == 1
    assert counts(drain(folder, spool)) == (2, 1, 0, 1)
    assert spool.queue().total == 2
    assert names(folder / "done") == ["1.json", "2.json"]
    assert spool.accepted_files(str(folder)) == []


def test_a_file_left_in_processing_by_a_killed_run_is_known_too(spool: Spool, folder: Path):
    leave(folder, "1.json", MESSAGE)
    with pytest.raises(Dies):
        drain(folder, DyingSpool(spool, "accept_file"))
    # A killed process puts nothing back.
    (folder / "1.json").rename(folder / "processing" / "1.json")
    assert counts(drain(folder, spool)) == (1, 0, 0, 1)
    assert spool.queue().total == 1


def test_a_file_that_was_put_away_and_comes_again_is_a_new_one(spool: Spool, folder: Path):
    path = leave(folder, "same.json", MESSAGE)
    drain(folder, spool)
    (folder / "done" / "same.json").rename(path)
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)
    leave(folder, "same.json", MESSAGE)
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)
    assert spool.queue().total == 3


def test_a_note_that_was_left_after_its_file_was_put_away_stops_no_new_file(
    spool: Spool, folder: Path
):
    path = leave(folder, "same.json", MESSAGE)
    with pytest.raises(Dies):
        drain(folder, DyingSpool(spool, "forget_files", before=True))
    assert (names(folder), names(folder / "done")) == ([], ["same.json"])
    assert spool.accepted_files(str(folder)) == [str(path)]
    drain(folder, spool)
    assert spool.accepted_files(str(folder)) == []
    (folder / "done" / "same.json").rename(path)
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)


def test_a_new_file_in_the_place_of_one_that_was_put_away_is_told_apart_by_its_time(
    spool: Spool, folder: Path
):
    leave(folder, "same.json", MESSAGE)
    with pytest.raises(Dies):
        drain(folder, DyingSpool(spool, "forget_files", before=True))
    leave(folder, "same.json", MESSAGE, at=LONG_AGO + 1)
    assert counts(drain(folder, spool)) == (1, 1, 0, 0)
    assert spool.queue().total == 2


def test_files_of_one_name_in_two_folders_are_two(spool: Spool, tmp_path: Path):
    for name in ("a", "b"):
        leave(tmp_path / name, "same.json", MESSAGE)
        with pytest.raises(Dies):
            drain(tmp_path / name, DyingSpool(spool, "accept_file"))
    assert spool.queue().total == 2
    assert spool.accepted_files(str(tmp_path / "a")) == [str(tmp_path / "a" / "same.json")]


def test_a_full_queue_leaves_the_files_where_they_lie(folder: Path, state_dir: Path):
    with closing(Spool.open(state_dir / "small.spool", max_bytes=1)) as small:
        leave(folder, "1.json", MESSAGE)
        with pytest.raises(SpoolFull):
            drain(folder, small)
        assert names(folder) == ["1.json"]
        assert small.accepted_files(str(folder)) == []


@pytest.mark.parametrize("name", [b"\xff.json", "ä \\x.json".encode()])
def test_any_name_will_do(spool: Spool, folder: Path, name: bytes):
    file = os.fsdecode(name)
    leave(folder, file, MESSAGE)
    with pytest.raises(Dies):
        drain(folder, DyingSpool(spool, "accept_file"))
    assert counts(drain(folder, spool)) == (1, 0, 0, 1)
    with pytest.raises(Dies):
        leave(folder, file, MESSAGE)
        drain(folder, DyingSpool(spool, "forget_files", before=True))
    drain(folder, spool)
    assert spool.accepted_files(str(folder)) == []


# The spool's side


def test_a_file_and_its_operations_are_accepted_together_or_not_at_all(spool: Spool):
    triples = [("insert", "t", {"n": n}) for n in range(3)]
    ids = spool.accept_file("/a/b", "1", triples)
    assert ids == [operation.id for operation in spool.queued("t")]
    assert spool.accept_file("/a/b", "1", triples) is None
    assert spool.accept_file("/a/b", "2", triples[:1]) is not None
    assert spool.accept_file("/a/bc/d", "1", triples[:1]) is not None
    assert spool.queue().total == 5
    assert spool.accepted_files("/a") == ["/a/b", "/a/bc/d"]
    assert spool.accepted_files("/a/b") == []
    spool.forget_files(["/a/b"])
    assert spool.accepted_files("/a") == ["/a/bc/d"]


def test_a_spool_of_the_first_version_learns_to_note_files(state_dir: Path):
    path = state_dir / "old.spool"
    with closing(Spool.open(path)) as spool:
        spool.append("insert", "t", {"n": 1})
        spool_id = spool.id
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE consumed")
        connection.execute("PRAGMA user_version = 1")
    with closing(Spool.open(path)) as spool:
        assert spool.accept_file("/a", "1", [("insert", "t", {"n": 2})])
        assert (spool.id, spool.queue().total) == (spool_id, 2)


# Tasks


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Some documents, and no tasks yet."""
    for name in ("docs/a.md", "docs/sub/b.md", "docs/.hidden.md", "docs/c.pdf", "top.md"):
        leave(tmp_path, name, "# Text\n")
    return tmp_path


def tasks_of(project: Path, **options: Any) -> Tasks:
    return Tasks(project / "helena_tasks", base=project, max_bytes=10_000, **options)


def ask(project: Path, name: str, content: object, queue: str = "batch_queue") -> Path:
    """A task file; text is the path of a document."""
    content = {"file_path": content, "priority": 1} if isinstance(content, str) else content
    return leave(project / "helena_tasks" / queue, name, content)


def test_the_documents_of_both_queues_are_found(project: Path):
    ask(project, "1.json", "docs/a.md")
    ask(project, "2.json", str(project / "docs" / "sub" / "b.md"), queue="realtime_queue")
    ask(project, "3.json", "docs/../top.md", queue="realtime_queue")
    with tasks_of(project) as tasks:
        found = sorted(path.relative_to(project).as_posix() for path in tasks.documents)
        assert found == ["docs/a.md", "docs/sub/b.md", "top.md"]
        assert counts(tasks.settle(None)) == (3, 3, 0, 0)
    for queue in ("batch_queue", "realtime_queue"):
        assert names(project / "helena_tasks" / queue) == []
    assert names(project / "helena_tasks" / "batch_queue" / "done") == ["1.json"]


def test_tasks_that_were_not_settled_go_back(project: Path):
    ask(project, "1.json", "docs/a.md")
    with tasks_of(project) as tasks:
        assert len(tasks.documents) == 1
    assert names(project / "helena_tasks" / "batch_queue") == ["1.json"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("docs/nowhere.md", "there is no file"),
        ("docs", "there is no file"),
        ("a" * 5000, "there is no file"),
        ("", "file_path: it must be the path of a document"),
        ({"file_path": 7}, "file_path: it must be the path of a document"),
        ({"file_path": "a\0b"}, "file_path: it must be the path of a document"),
        ({}, "file_path: it must be the path of a document"),
        ([], "but not an object"),
        ("docs/c.pdf", "is no document by [documents] extensions, ignore"),
        ("docs/.hidden.md", "is no document by [documents] extensions, ignore"),
    ],
)
def test_a_task_without_a_document_goes_aside_with_the_reason(
    project: Path, content: object, reason: str
):
    bad = ask(project, "bad.json", content)
    ask(project, "good.json", "docs/a.md")
    with tasks_of(project) as tasks:
        tasks.select(DocumentSettings(), (), ())
        assert tasks.documents == [project / "docs" / "a.md"]
        report = tasks.settle(None)
    assert counts(report) == (2, 1, 1, 0)
    assert report.failures[0].path == str(bad)
    assert reason in report.failures[0].reason
    assert names(bad.parent / "failed") == ["bad.json", "bad.json.reason.txt"]


def test_a_task_whose_document_could_not_be_indexed_fails_with_its_reason(project: Path):
    for name in ("a.md", "sub/b.md"):
        ask(project, f"{name[-4]}.json", f"docs/{name}")
    failures = (
        Failure(str(project / "docs" / "a.md"), "Permission denied"),
        Failure(str(project / "docs" / "sub" / "b.md"), "bad front matter", indexed=True),
    )
    numbers = {"found": 2, "new": 1, "changed": 0, "unchanged": 0, "missing": 0, "failed": 1}
    with tasks_of(project) as tasks:
        report = tasks.settle(Report(**numbers, failures=failures))
    assert counts(report) == (2, 1, 1, 0)
    assert "docs/a.md: Permission denied" in report.failures[0].reason


def test_documents_below_the_base_belong_to_the_first_folder_on_their_way(project: Path):
    ask(project, "1.json", "docs/sub/b.md")
    ask(project, "2.json", "top.md")
    elsewhere = leave(project.parent / f"{project.name}-other", "x.md", "# Text\n")
    ask(project, "3.json", str(elsewhere))
    with tasks_of(project) as tasks:
        roots = tasks.select(DocumentSettings(), (), ()).roots
        (failure,) = tasks.settle(None).failures
    assert set(roots) == {str(project), str(project / "docs")}
    # Whoever may leave tasks may not publish what else can be read on this machine.
    assert "lies in no folder that is indexed" in failure.reason


@pytest.mark.parametrize("known", ["known", "configured", "asked for"])
def test_documents_within_a_root_make_no_other(project: Path, known: str):
    ask(project, "1.json", "docs/sub/b.md")
    settings = DocumentSettings(roots=(str(project),) if known == "configured" else ())
    claims = (("name", str(project)),) if known == "known" else ()
    places = (project,) if known == "asked for" else ()
    with tasks_of(project) as tasks:
        assert tasks.select(settings, claims, places) == settings
        assert len(tasks.documents) == 1


def test_tasks_in_a_dry_run_are_read_and_left(project: Path):
    ask(project, "1.json", "docs/a.md")
    ask(project, "2.json", "docs/nowhere.md")
    with tasks_of(project, dry_run=True) as tasks:
        assert counts(tasks.settle(None)) == (2, 1, 1, 0)
    queue = project / "helena_tasks" / "batch_queue"
    assert names(queue) == ["1.json", "2.json"]
    assert [p for p in queue.iterdir() if p.is_dir()] == []
