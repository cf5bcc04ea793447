"""Folders of documents end in a real database: what is new, what changed, what is missing."""

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from helena_cli.batch.operation import Operation
from helena_cli.database.registry import DocumentRegistry
from helena_cli.documents import reconcile, scan
from helena_cli.documents.known import SETTLED_NS
from helena_cli.documents.prune import plan_prune, prune
from helena_cli.documents.reconcile import Report
from helena_cli.errors import ConfigurationError, NamespaceClaimed, SchemaMissing, UsageError
from helena_cli.runtime import Runtime
from helena_cli.settings import DatabaseSettings, DocumentSettings, Settings

CORPUS = Path(__file__).parents[3] / "shared" / "corpus" / "hugo"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="there is no ../shared/corpus/hugo")

pytestmark = pytest.mark.postgres


class World:
    """A database, a spool and a host; and short ways to use them."""

    host = "here"

    def __init__(self, runtime: Runtime, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self.runtime = runtime
        self.connection = connection
        self.settings = DocumentSettings()

    def queue(self, *paths: Path, host: str = "", **options: Any) -> Report:
        """Reconcile, and leave what is queued in the spool."""
        with self.runtime.connection("documents") as connection:
            return reconcile.reconcile(
                paths,
                settings=self.settings,
                host=host or self.host,
                registry=DocumentRegistry(connection),
                queue=self.runtime.spool,
                **options,
            )

    def run(self, *paths: Path, **options: Any) -> Report:
        """Reconcile and write."""
        report = self.queue(*paths, **options)
        assert self.runtime.engine.flush(timeout=60)
        assert self.runtime.spool.dead_letters() == []
        return report

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        return self.connection.execute(query, values).fetchall()

    def documents(self) -> dict[str, dict[str, Any]]:
        rows = self.rows("SELECT * FROM es_document_references")
        return {row["es_doc_id"]: row for row in rows}

    def metadata(self, doc_id: str) -> dict[str, Any]:
        metadata: dict[str, Any] = self.documents()[doc_id]["metadata"]
        return metadata

    def deleted(self) -> set[str]:
        return {i for i, row in self.documents().items() if "deleted_at" in (row["metadata"] or ())}

    def queued(self) -> int:
        return self.runtime.spool.queue().total


@pytest.fixture
def world(helena_dsn: str, state_dir: Path) -> Iterator[World]:
    settings = Settings(database=DatabaseSettings(dsn=helena_dsn), state_dir=state_dir)
    with (
        psycopg.connect(helena_dsn, autocommit=True, row_factory=dict_row) as connection,
        Runtime(settings) as runtime,
    ):
        yield World(runtime, connection)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A small folder of documents."""
    folder = tmp_path / "notes"
    write(folder / "a.md", "# Alpha\n")
    write(folder / "sub/b.md", "# Beta\n")
    write(folder / "sub/c.markdown", "# Gamma\n")
    write(folder / "picture.png", "no document")
    return folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def counts(report: Report) -> tuple[int, ...]:
    """found, new, changed, unchanged, missing, failed"""
    return (
        report.found,
        report.new,
        report.changed,
        report.unchanged,
        report.missing,
        report.failed,
    )


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read so long after their last change that their time stamps can be trusted."""

    class Clock:
        @staticmethod
        def time_ns() -> int:
            return time.time_ns() + 1000 * SETTLED_NS

    monkeypatch.setattr(scan, "time", Clock)


# What is new, changed and unchanged


def test_each_document_gets_one_row(world: World, notes: Path):
    assert counts(world.run(notes)) == (3, 3, 0, 0, 0, 0)
    rows = world.documents()
    assert set(rows) == {"notes:a.md", "notes:sub/b.md", "notes:sub/c.markdown"}
    row = rows["notes:sub/b.md"]
    assert (row["filename"], row["file_size"], row["es_index"]) == ("b.md", 7, "osint_reports_pdf")
    assert row["metadata"]["title"] == "Beta"
    assert row["metadata"]["path"] == "sub/b.md"


def test_a_second_run_queues_nothing_and_keeps_the_rows(world: World, notes: Path):
    world.run(notes)
    before = world.rows("SELECT *, xmin::text FROM es_document_references ORDER BY id")
    accepted = world.runtime.spool.conservation().accepted
    assert counts(world.run(notes)) == (3, 0, 0, 3, 0, 0)
    assert world.runtime.spool.conservation().accepted == accepted
    assert world.rows("SELECT *, xmin::text FROM es_document_references ORDER BY id") == before


def test_a_changed_document_updates_its_row(world: World, notes: Path):
    world.run(notes)
    row = world.documents()["notes:a.md"]
    write(notes / "a.md", "# Omega\n")
    assert counts(world.run(notes)) == (3, 0, 1, 2, 0, 0)
    changed = world.documents()["notes:a.md"]
    assert changed["id"] == row["id"]
    assert changed["sha256"] != row["sha256"]
    assert changed["metadata"]["title"] == "Omega"


def test_a_new_time_with_the_same_content_is_no_change(world: World, notes: Path):
    world.run(notes)
    os.utime(notes / "a.md")
    assert counts(world.run(notes)) == (3, 0, 0, 3, 0, 0)


@pytest.mark.usefixtures("later")
def test_settled_time_stamps_spare_the_reading(
    world: World, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    world.run(notes)
    monkeypatch.setattr(scan, "read", None)
    assert counts(world.run(notes)) == (3, 0, 0, 3, 0, 0)


def test_fresh_time_stamps_prove_nothing(world: World, notes: Path):
    """A second change within the same tick would leave size and times as they are."""
    world.run(notes)
    facts = (notes / "a.md").stat()
    world.connection.execute(
        "UPDATE es_document_references SET sha256 = 'of an earlier moment' WHERE filename = 'a.md'"
    )
    assert (notes / "a.md").stat().st_mtime_ns == facts.st_mtime_ns
    assert counts(world.run(notes)) == (3, 0, 1, 2, 0, 0)


@pytest.mark.usefixtures("later")
def test_a_rewrite_with_a_restored_time_is_seen(world: World, notes: Path):
    world.run(notes)
    facts = (notes / "a.md").stat()
    write(notes / "a.md", "# Delta\n")
    os.utime(notes / "a.md", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (notes / "a.md").stat().st_size == facts.st_size
    assert counts(world.run(notes)) == (3, 0, 1, 2, 0, 0)


def test_what_is_still_queued_counts_as_known(world: World, notes: Path):
    world.queue(notes)
    assert counts(world.queue(notes)) == (3, 0, 0, 3, 0, 0)
    write(notes / "a.md", "# Omega\n")
    assert counts(world.queue(notes)) == (3, 0, 1, 2, 0, 0)
    (notes / "sub/b.md").unlink()
    assert counts(world.queue(notes)) == (2, 0, 0, 2, 1, 0)
    assert counts(world.run(notes)) == (2, 0, 0, 2, 0, 0)
    assert world.metadata("notes:a.md")["title"] == "Omega"
    # The mark was made of what was queued: nothing of it is lost.
    assert world.deleted() == {"notes:sub/b.md"}
    assert world.metadata("notes:sub/b.md")["title"] == "Beta"


def test_other_operations_on_the_table_are_left_alone(world: World, notes: Path):
    world.run(notes)
    table = "es_document_references"
    world.runtime.spool.extend(
        [
            ("insert", table, {"es_doc_id": "notes:by-hand", "es_index": "x"}),
            ("insert", table, {"es_doc_id": "elsewhere:a.md", "es_index": "x", "metadata": {}}),
            ("update", table, {"es_doc_id": "notes:a.md", "issuer": "somebody"}),
            ("insert", table, {"es_index": "without an id"}),
            ("message", table, {"es_doc_id": "notes:sub/b.md", "es_index": "x", "metadata": {}}),
        ]
    )
    assert counts(world.queue(notes)) == (3, 0, 0, 3, 0, 0)


def test_a_row_whose_metadata_somebody_replaced_is_indexed_anew(world: World, notes: Path):
    world.run(notes)
    data = {"es_doc_id": "notes:a.md", "metadata": {"mine": True}}
    world.runtime.spool.append("update", "es_document_references", data)
    assert counts(world.run(notes)) == (3, 1, 0, 2, 0, 0)
    assert world.metadata("notes:a.md")["title"] == "Alpha"


def test_rows_of_other_programs_are_no_documents_of_a_root(world: World, notes: Path):
    world.run(notes)
    for doc_id, metadata in (("notes:x", "{}"), ("notes:y", "[1]"), ("notes:z", None)):
        world.connection.execute(
            "INSERT INTO es_document_references (es_index, es_doc_id, metadata) VALUES ('x',%s,%s)",
            [doc_id, metadata],
        )
    odd = '{"namespace": "notes", "modified_ns": "soon", "read_ns": 1e400}'
    world.connection.execute(
        "UPDATE es_document_references SET metadata = metadata || %s WHERE filename = 'a.md'", [odd]
    )
    assert counts(world.run(notes)) == (3, 0, 0, 3, 0, 0)
    assert world.deleted() == set()


def queued_chunks(world: World, notes: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations a run gives to the queue at a time."""
    sizes: list[int] = []
    extend = world.runtime.spool.extend

    def record(operations: Any) -> list[int]:
        sizes.append(len(operations))
        return extend(operations)

    monkeypatch.setattr(world.runtime.spool, "extend", record)
    world.run(notes)
    return sizes


def test_documents_are_queued_in_chunks(world: World, notes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("helena_cli.documents.outbox.CHUNK", 2)
    assert queued_chunks(world, notes, monkeypatch) == [2, 1, 2]


def test_long_texts_make_small_chunks(world: World, notes: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("helena_cli.documents.outbox.CHUNK_BYTES", 10)
    assert queued_chunks(world, notes, monkeypatch) == [2, 1, 2]


def test_a_document_that_the_queue_refuses_fails_alone(world: World, notes: Path):
    write(notes / "long.md", "---\ntext: " + "x" * 20_000 + "\n---\n")
    world.runtime.spool._max_operation_bytes = 10_000
    report = world.run(notes)
    assert counts(report) == (4, 3, 0, 0, 0, 1)
    assert [failure.path for failure in report.failures] == [str(notes / "long.md")]
    assert len(world.documents()) == 3


def test_progress_is_told(world: World, notes: Path):
    told: list[tuple[int, int | None, str]] = []
    world.run(notes, progress=lambda *facts: told.append(facts))
    assert told[-1][0] == 3


def test_a_dry_run_counts_and_changes_nothing(world: World, notes: Path):
    assert counts(world.queue(notes, dry_run=True)) == (3, 3, 0, 0, 0, 0)
    assert world.queued() == 0
    assert world.rows("SELECT * FROM helena.roots") == []
    world.run(notes)
    (notes / "a.md").unlink()
    assert counts(world.queue(notes, dry_run=True)) == (2, 0, 0, 2, 1, 0)
    assert world.queued() == 0


# What is missing


def test_a_missing_document_is_marked_and_keeps_everything_else(world: World, notes: Path):
    world.run(notes)
    before = world.documents()["notes:a.md"]
    (notes / "a.md").unlink()
    assert counts(world.run(notes)) == (2, 0, 0, 2, 1, 0)
    after = world.documents()["notes:a.md"]
    assert after["metadata"].pop("deleted_at")
    assert after == before


def test_a_marked_document_is_not_marked_again(world: World, notes: Path):
    world.run(notes)
    (notes / "a.md").unlink()
    world.run(notes)
    marked = world.metadata("notes:a.md")["deleted_at"]
    assert counts(world.run(notes)) == (2, 0, 0, 2, 0, 0)
    assert world.metadata("notes:a.md")["deleted_at"] == marked


@pytest.mark.usefixtures("later")
def test_a_document_that_comes_back_loses_its_mark(world: World, notes: Path, tmp_path: Path):
    world.run(notes)
    (notes / "a.md").rename(tmp_path / "away.md")
    world.run(notes)
    assert world.deleted() == {"notes:a.md"}
    (tmp_path / "away.md").rename(notes / "a.md")
    assert counts(world.run(notes)) == (3, 0, 1, 2, 0, 0)
    assert world.deleted() == set()


@pytest.mark.usefixtures("later")
def test_a_document_that_was_ignored_for_a_while_comes_back(world: World, notes: Path):
    """Its time stamps are those of the row that carries the mark."""
    world.run(notes)
    write(notes / ".helenaignore", "a.md")
    world.run(notes)
    assert world.deleted() == {"notes:a.md"}
    (notes / ".helenaignore").unlink()
    assert counts(world.run(notes)) == (3, 0, 1, 2, 0, 0)
    assert world.deleted() == set()


def test_a_missing_document_that_was_used_stays(world: World, notes: Path):
    world.run(notes)
    world.connection.execute(
        "INSERT INTO es_document_usage_log (es_doc_id, accessed_by) VALUES ('notes:a.md', 'me')"
    )
    (notes / "a.md").unlink()
    world.run(notes)
    assert len(world.rows("SELECT * FROM es_document_usage_log")) == 1


def test_missing_documents_can_be_ignored(world: World, notes: Path):
    world.run(notes)
    (notes / "a.md").unlink()
    world.settings = DocumentSettings(on_missing="ignore")
    report = world.run(notes)
    assert counts(report) == (2, 0, 0, 2, 1, 0)
    assert (report.unmarked, report.failures) == (1, ())
    assert world.deleted() == set()


def test_nothing_is_missing_in_an_empty_root(world: World, notes: Path):
    world.run(notes)
    shutil.rmtree(notes)
    notes.mkdir()
    report = world.run(notes, allow_missing=True)
    assert (report.missing, report.unmarked, report.incomplete) == (3, 3, 1)
    assert "empty" in report.failures[0].reason
    assert world.deleted() == set()


def test_nothing_is_missing_when_the_root_is_gone(world: World, notes: Path):
    world.run(notes)
    notes.rename(notes.with_name("elsewhere"))
    for path in (notes, notes / "a.md", notes / "sub"):
        report = world.run(path, allow_missing=True)
        assert (report.missing, report.incomplete) == (0, 1)
    assert world.deleted() == set()


@pytest.mark.parametrize("name", ["typo.md", "sub/typo.md", "typo", "typo.txt"])
def test_a_path_where_nothing_is_and_was_is_a_failure_and_the_others_are_done(
    world: World, notes: Path, name: str
):
    report = world.run(notes / "a.md", notes / name)
    assert (report.new, report.missing, report.incomplete) == (1, 0, 1)
    assert [failure.path for failure in report.failures] == [str(notes / name)]
    assert "no such file" in report.failures[0].reason


def test_a_path_whose_documents_are_marked_already_is_no_failure(world: World, notes: Path):
    world.run(notes)
    shutil.rmtree(notes / "sub")
    for _ in range(2):
        report = world.run(notes / "sub")
        assert (report.incomplete, report.failures) == (0, ())
    assert world.deleted() == {"notes:sub/b.md", "notes:sub/c.markdown"}


def test_a_folder_that_went_with_the_root_inside_of_it_is_no_failure(world: World, notes: Path):
    write(notes / "mid/inner/x.md", "# X\n")
    world.run(notes / "mid/inner")
    world.run(notes)
    shutil.rmtree(notes / "mid")
    report = world.run(notes / "mid")
    assert (report.missing, report.incomplete, report.failures) == (1, 0, ())


def test_a_path_that_cannot_be_looked_at_is_not_called_gone(
    world: World, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    world.run(notes)
    look = os.lstat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("hidden.md"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return look(path, **options)

    monkeypatch.setattr(os, "lstat", refuse)
    assert world.run(notes / "sub/hidden.md").failures == ()


def test_a_path_that_is_ignored_and_gone_is_no_failure(world: World, notes: Path):
    world.run(notes)
    report = world.run(notes / "node_modules/x.md")
    assert (report.incomplete, report.failures) == (0, ())


def many(folder: Path, count: int) -> list[Path]:
    return [write(folder / f"{number:02}.md", f"# {number}\n") for number in range(count)]


def test_many_missing_documents_need_a_confirmation(world: World, tmp_path: Path):
    files = many(tmp_path / "notes", 30)
    world.run(tmp_path / "notes")
    for file in files[:11]:
        file.unlink()
    report = world.run(tmp_path / "notes")
    assert (report.missing, report.unmarked, report.incomplete) == (11, 11, 1)
    assert "--allow-missing" in report.failures[0].reason
    assert world.deleted() == set()
    report = world.run(tmp_path / "notes", allow_missing=True)
    assert (report.missing, report.unmarked, report.failures) == (11, 0, ())
    assert len(world.deleted()) == 11


@pytest.mark.parametrize(("known", "gone"), [(12, 10), (60, 12)])
def test_few_missing_documents_need_none(world: World, tmp_path: Path, known: int, gone: int):
    """Not more than ten, or not more than a fifth."""
    files = many(tmp_path / "notes", known)
    world.run(tmp_path / "notes")
    for file in files[:gone]:
        file.unlink()
    assert world.run(tmp_path / "notes").unmarked == 0
    assert len(world.deleted()) == gone


def test_deleted_paths_that_are_named_are_marked_however_many(world: World, tmp_path: Path):
    """File events name them; the root itself stands, even if it is empty now."""
    files = many(tmp_path / "notes", 12)
    world.run(tmp_path / "notes")
    for file in files:
        file.unlink()
    report = world.run(*files)
    assert (report.missing, report.unmarked) == (12, 0)
    assert len(world.deleted()) == 12


def test_a_deleted_folder_that_is_named_takes_its_documents_along(world: World, notes: Path):
    world.run(notes)
    write(notes / "subordinate.md", "not in it")
    world.run(notes)
    shutil.rmtree(notes / "sub")
    assert world.run(notes / "sub").missing == 2
    assert world.deleted() == {"notes:sub/b.md", "notes:sub/c.markdown"}


def test_only_what_was_looked_at_can_be_missing(world: World, notes: Path):
    world.run(notes)
    (notes / "a.md").unlink()
    assert counts(world.run(notes / "sub")) == (2, 0, 0, 2, 0, 0)
    assert counts(world.run(notes / "sub/b.md")) == (1, 0, 0, 1, 0, 0)
    assert world.deleted() == set()


def test_single_documents_are_looked_up_by_their_identifiers(world: World, notes: Path):
    """A file event must not cost a look at all that is known."""
    world.run(notes)
    write(notes / "odd.md/x.md", "# In a folder that is called like a document\n")
    world.run(notes)
    (notes / "sub/c.markdown").unlink()
    asked = []

    class Watched(DocumentRegistry):
        def documents(self, namespace: str, doc_ids: Any = None) -> Any:
            asked.append(doc_ids)
            return super().documents(namespace, doc_ids)

    paths = (["a.md"], ["sub/b.md", "sub/c.markdown"], ["sub"], ["odd.md"], ["a.md", "sub"])
    with world.runtime.connection("documents") as connection:
        for names in paths:
            reconcile.reconcile(
                [notes / name for name in names],
                settings=world.settings,
                host=world.host,
                registry=Watched(connection),
                queue=world.runtime.spool,
            )
    identifiers = [["notes:a.md"], ["notes:sub/b.md", "notes:sub/c.markdown"]]
    assert asked == [*identifiers, None, None, None]


def test_a_folder_with_the_name_of_a_document_that_is_gone_takes_its_documents_with_it(
    world: World, notes: Path
):
    write(notes / "odd.md/x.md", "# In a folder that is called like a document\n")
    world.run(notes)
    shutil.rmtree(notes / "odd.md")
    assert world.run(notes / "odd.md").missing == 1
    assert world.deleted() == {"notes:odd.md/x.md"}


def test_a_path_that_never_was_is_no_news(world: World, notes: Path):
    """An editor's temporary file comes and goes before anybody looks."""
    world.run(notes)
    assert counts(world.run(notes / "never.md")) == (0, 0, 0, 0, 0, 0)


def test_a_document_that_vanishes_while_it_is_read_is_left_to_the_next_run(
    world: World, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    world.run(notes)
    write(notes / "a.md", "# Omega\n")
    monkeypatch.setattr(scan, "read", lambda *_, **__: None)
    assert counts(world.run(notes)) == (0, 0, 0, 0, 0, 0)
    assert world.deleted() == set()


def test_a_document_that_is_ignored_now_is_missing(world: World, notes: Path):
    world.run(notes)
    write(notes / ".helenaignore", "sub/\n")
    assert counts(world.run(notes)) == (1, 0, 0, 1, 2, 0)
    assert counts(world.run(notes / "sub/b.md")) == (0, 0, 0, 0, 0, 0)


# Roots and namespaces


def test_a_path_inside_of_a_known_root_keeps_its_identifiers(world: World, notes: Path):
    world.run(notes)
    write(notes / "sub/b.md", "# Omega\n")
    write(notes / "sub/d.md", "# New\n")
    assert counts(world.run(notes / "sub/b.md", notes / "sub/d.md")) == (2, 1, 1, 0, 0, 0)
    assert counts(world.run(notes / "sub")) == (3, 0, 0, 3, 0, 0)
    assert len(world.documents()) == 4
    assert world.rows("SELECT namespace, host, path FROM helena.roots") == [
        {"namespace": "notes", "host": "here", "path": str(notes)}
    ]


def test_the_folder_of_a_single_document_becomes_its_root(world: World, notes: Path):
    assert counts(world.run(notes / "sub/b.md")) == (1, 1, 0, 0, 0, 0)
    assert set(world.documents()) == {"sub:b.md"}


def test_a_folder_inside_of_another_keeps_its_own_root(world: World, notes: Path):
    """No document ever has two rows."""
    world.run(notes / "sub/b.md")
    assert counts(world.run(notes)) == (3, 2, 0, 1, 0, 0)
    assert set(world.documents()) == {"sub:b.md", "sub:c.markdown", "notes:a.md"}


def test_a_root_inside_of_another_can_be_deleted_with_it(world: World, notes: Path):
    world.run(notes / "sub/b.md")
    world.run(notes)
    shutil.rmtree(notes / "sub")
    assert counts(world.run(notes)) == (1, 0, 0, 1, 2, 0)
    assert world.deleted() == {"sub:b.md", "sub:c.markdown"}
    assert world.run(notes / "sub").incomplete == 1


def test_configured_roots_come_before_larger_claims(world: World, notes: Path):
    world.settings = DocumentSettings(roots=(str(notes / "sub"),))
    world.run(notes)
    assert set(world.documents()) == {"sub:b.md", "sub:c.markdown", "notes:a.md"}


def test_paths_that_overlap_are_looked_at_once(world: World, notes: Path, monkeypatch: Any):
    report = world.run(notes / "sub", notes, notes / "a.md", notes)
    assert counts(report) == (3, 3, 0, 0, 0, 0)
    assert all(i.startswith("notes:") for i in world.documents())
    monkeypatch.chdir(notes / "sub")
    assert counts(world.run(Path(), Path("b.md"), Path("../a.md"))) == (3, 0, 0, 3, 0, 0)


def test_a_root_reached_through_a_link_is_the_same_root(world: World, notes: Path, tmp_path: Path):
    world.run(notes)
    (tmp_path / "link").symlink_to(notes)
    assert counts(world.run(tmp_path / "link")) == (3, 0, 0, 3, 0, 0)
    assert counts(world.run(tmp_path / "link/sub/b.md")) == (1, 0, 0, 1, 0, 0)


def test_another_folder_of_the_same_name_is_refused(world: World, notes: Path, tmp_path: Path):
    world.run(notes)
    other = write(tmp_path / "more/notes/x.md", "x").parent
    for options in ({}, {"dry_run": True}):
        with pytest.raises(NamespaceClaimed) as caught:
            world.run(other, **options)
        assert caught.value.exit_code == 3
        assert "HELENA_DOCUMENTS_NAMESPACE" in caught.value.remedy
    assert world.queued() == 0
    world.settings = DocumentSettings(namespace="other")
    assert counts(world.run(other)) == (1, 1, 0, 0, 0, 0)
    world.settings = DocumentSettings()
    assert counts(world.run(other)) == (1, 0, 0, 1, 0, 0)


def test_another_host_with_the_same_folder_is_refused(world: World, notes: Path):
    world.run(notes)
    with pytest.raises(NamespaceClaimed):
        world.run(notes, host="there")


def test_two_new_folders_of_one_name_are_refused_together(world: World, tmp_path: Path):
    folders = [write(tmp_path / f"{name}/notes/x.md", "x").parent for name in "ab"]
    with pytest.raises(NamespaceClaimed):
        world.run(*folders)
    assert world.rows("SELECT * FROM helena.roots") == []


def test_one_configured_namespace_cannot_name_two_folders(world: World, tmp_path: Path):
    folders = [write(tmp_path / f"{name}/x.md", "x").parent for name in "ab"]
    world.settings = DocumentSettings(namespace="both")
    with pytest.raises(ConfigurationError):
        world.run(*folders)


def test_a_configured_namespace_does_not_rename_a_known_root(
    world: World, notes: Path, caplog: pytest.LogCaptureFixture
):
    world.run(notes)
    world.settings = DocumentSettings(namespace="other")
    assert counts(world.run(notes)) == (3, 0, 0, 3, 0, 0)
    assert "keeps its namespace notes" in caplog.text


@pytest.mark.parametrize("name", ["a:b", "a\nb", "\udcff", "x" * 256, "a\\b"])
def test_an_impossible_namespace_is_refused(world: World, notes: Path, name: str):
    world.settings = DocumentSettings(namespace=name)
    with pytest.raises(ConfigurationError):
        world.run(notes)


def test_namespaces_that_begin_alike_are_kept_apart(world: World, tmp_path: Path):
    for name in ("n", "n:o", "no"):
        write(tmp_path / name / "x.md", name)
        assert counts(world.run(tmp_path / name)) == (1, 1, 0, 0, 0, 0)
    assert set(world.documents()) == {"n:x.md", r"n\x3ao:x.md", "no:x.md"}
    for name in ("n", "n:o", "no"):
        assert counts(world.run(tmp_path / name)) == (1, 0, 0, 1, 0, 0)


def test_a_path_that_is_neither_there_nor_known_is_refused(world: World, tmp_path: Path):
    with pytest.raises(UsageError):
        world.run(tmp_path / "nowhere")


def test_a_configured_root_that_is_not_there_is_reported(world: World, tmp_path: Path):
    world.settings = DocumentSettings(roots=(str(tmp_path / "unmounted"),))
    report = world.run(tmp_path / "unmounted")
    assert (report.incomplete, report.failed) == (1, 0)
    assert world.rows("SELECT * FROM helena.roots") == []


def test_a_database_without_tables_says_what_to_do(dsn: str, notes: Path, world: World):
    with psycopg.connect(dsn, autocommit=True) as connection, pytest.raises(SchemaMissing):
        DocumentRegistry(connection).roots("here")


# Odd files and folders

needs_posix = pytest.mark.skipif(os.name != "posix", reason="file names and modes as of POSIX")


@needs_posix
def test_strange_names_are_kept_apart_and_stored(world: World, tmp_path: Path):
    folder = tmp_path / "notes"
    folder.mkdir()
    names = [
        b"caf\xe9.md",
        rb"caf\xe9.md",
        "café.md".encode(),
        b"two\nlines.md",
        b'it\'s "quoted".md',
        b"percent%s.md",
        "\N{OWL}.md".encode(),
        b"a:b.md",
        b"-rf.md",
        b" .md",
        b"a.md ",
        b"x" * 251 + b".md",
    ]
    for name in names:
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_text("x")
    assert counts(world.run(folder)) == (11, 11, 0, 0, 0, 0)
    assert counts(world.run(folder)) == (11, 0, 0, 11, 0, 0)
    assert {r"notes:caf\xe9.md", r"notes:caf\x5cxe9.md", "notes:café.md"} <= set(world.documents())
    for name in names[:2]:
        Path(os.fsdecode(bytes(folder) + b"/" + name)).unlink()
    assert counts(world.run(folder)) == (9, 0, 0, 9, 2, 0)


@needs_posix
def test_a_root_with_a_name_that_is_no_text_works(world: World, tmp_path: Path):
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    write(folder / "a.md", "x")
    write(folder / "sub/b.md", "x")
    assert counts(world.run(folder)) == (2, 2, 0, 0, 0, 0)
    assert counts(world.run(folder / "sub")) == (1, 0, 0, 1, 0, 0)
    assert set(world.documents()) == {r"caf\xe9:a.md", r"caf\xe9:sub/b.md"}


def test_a_path_too_long_for_an_index_is_stored(world: World, tmp_path: Path):
    folder = tmp_path / "notes"
    deep = folder.joinpath(*("".join(map(chr, range(0x4E00 + n, 0x4E50 + n))) for n in range(14)))
    write(deep / "a.md", "x")
    write(deep / "b.md", "x")
    assert counts(world.run(folder)) == (2, 2, 0, 0, 0, 0)
    assert counts(world.run(folder)) == (2, 0, 0, 2, 0, 0)
    (deep / "a.md").unlink()
    assert counts(world.run(deep / "a.md")) == (0, 0, 0, 0, 1, 0)


@needs_posix
def test_nothing_but_regular_files_is_opened(
    world: World, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    os.mkfifo(notes / "pipe.md")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(notes)
        listener.bind("socket.md")
        (notes / "null.md").symlink_to("/dev/zero")
        (notes / "folder.md").mkdir()
        assert counts(world.run(notes)) == (3, 3, 0, 0, 0, 0)


@needs_posix
def test_links_are_followed_to_files_inside_of_the_root_only(
    world: World, notes: Path, tmp_path: Path
):
    secret = write(tmp_path / "secret.md", "secret")
    write(tmp_path / "notes-outside/x.md", "outside")
    (notes / "inside.md").symlink_to("sub/b.md")
    (notes / "outside.md").symlink_to(secret)
    (notes / "sibling.md").symlink_to(tmp_path / "notes-outside/x.md")
    (notes / "dangling.md").symlink_to("nowhere.md")
    (notes / "loop.md").symlink_to("loop.md")
    (notes / "around").symlink_to(notes)
    (notes / "away").symlink_to(tmp_path)
    assert counts(world.run(notes)) == (4, 4, 0, 0, 0, 0)
    assert world.metadata("notes:inside.md")["title"] == "Beta"
    assert counts(world.run(notes / "outside.md")) == (0, 0, 0, 0, 0, 0)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: become nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


class Memory:
    """A queue that needs no file."""

    def __init__(self) -> None:
        self.operations: list[Any] = []

    def extend(self, operations: Iterable[Any]) -> list[int]:
        self.operations.extend(operations)
        return []

    def queued(self, table: str) -> Iterator[Operation]:
        return iter(())


@needs_posix
def test_what_may_not_be_read_fails_and_is_not_missing(
    world: World, state_dir: Path, helena_dsn: str
):
    folder = state_dir / "notes"
    write(folder / "a.md", "# Alpha\n")
    write(folder / "locked.md", "# Beta\n")
    write(folder / "closed/c.md", "# Gamma\n")
    write(folder / "listed/d.md", "# Delta\n")
    world.run(folder)
    state_dir.chmod(0o755)
    write(folder / "locked.md", "# Changed\n").chmod(0)
    (folder / "closed").chmod(0)
    (folder / "listed").chmod(0o444)
    with psycopg.connect(helena_dsn, autocommit=True) as connection, without_privileges():
        report = reconcile.reconcile(
            [folder],
            settings=world.settings,
            host=world.host,
            registry=DocumentRegistry(connection),
            queue=Memory(),
        )
    for closed in ("closed", "listed"):
        (folder / closed).chmod(0o755)
    assert counts(report) == (3, 0, 0, 1, 0, 2)
    assert report.incomplete == 1
    assert [failure.path for failure in report.failures] == [
        f"{folder}/{path}" for path in ("locked.md", "closed", "listed/d.md")
    ]


@needs_posix
def test_a_root_that_may_not_be_listed_is_not_judged(
    world: World, state_dir: Path, helena_dsn: str
):
    folder = state_dir / "notes"
    write(folder / "a.md", "# Alpha\n")
    world.run(folder)
    state_dir.chmod(0o755)
    folder.chmod(0)
    with psycopg.connect(helena_dsn, autocommit=True) as connection, without_privileges():
        report = reconcile.reconcile(
            [folder],
            settings=world.settings,
            host=world.host,
            registry=DocumentRegistry(connection),
            queue=Memory(),
        )
    folder.chmod(0o755)
    assert counts(report) == (0, 0, 0, 0, 0, 0)
    assert report.incomplete == 1


def test_a_root_that_fails_while_it_is_listed_is_not_judged(
    world: World, notes: Path, monkeypatch: pytest.MonkeyPatch
):
    world.run(notes)
    failure = scan.Unreadable("", "Input/output error")
    monkeypatch.setattr(scan, "walk", lambda *_, **__: iter([failure]))
    report = world.run(notes)
    assert (report.missing, report.incomplete) == (0, 1)
    assert world.deleted() == set()


# Ignored


def test_ignored_trees_are_not_walked(world: World, notes: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in (".git", "node_modules", "__pycache__", "venv", "x/node_modules", "x/.cache"):
        write(notes / folder / "y/z.md", "x")
    for folder in ("helena_batch_pending", "helena_tasks/batch_queue", "db/sql/realtime_updates"):
        write(notes / folder / "z.md", "x")
    write(notes / ".hidden.md", "x")
    walked = []
    listing = os.scandir

    def scandir(path: str) -> Any:
        walked.append(os.path.relpath(path, notes))
        return listing(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        assert counts(world.queue(notes)) == (3, 3, 0, 0, 0, 0)
    assert set(walked) == {".", "sub", "x", "db", "db/sql"}


def test_a_root_may_lie_in_a_hidden_folder(world: World, tmp_path: Path):
    write(tmp_path / ".private/venv/a.md", "x")
    assert counts(world.run(tmp_path / ".private/venv")) == (1, 1, 0, 0, 0, 0)


def test_an_ignore_file_adds_patterns(world: World, notes: Path):
    write(notes / "drafts/x.md", "x")
    write(notes / "sub/drafts/y.md", "x")
    write(notes / ".kept/z.md", "x")
    write(notes / ".helenaignore", "\ufeff# comment\r\n/drafts/\r\n*.markdown\r\n!.kept/\r\n")
    world.run(notes)
    assert set(world.documents()) == {
        "notes:a.md",
        "notes:sub/b.md",
        "notes:sub/drafts/y.md",
        "notes:.kept/z.md",
    }


@pytest.mark.parametrize("content", [b"good\n[z-a]\n", b"!\n", b"\xff\xfe"])
def test_an_ignore_file_that_cannot_be_used_stops_everything(
    world: World, notes: Path, content: bytes
):
    (notes / ".helenaignore").write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        world.run(notes)
    assert ".helenaignore" in str(caught.value)
    assert world.queued() == 0


# No document vanishes


def test_every_broken_document_has_its_row(world: World, tmp_path: Path):
    folder = tmp_path / "notes"
    folder.mkdir()
    contents = {
        "yaml.md": b"---\ntitle: [\n---\ntext",
        "date.md": b"---\ndate: 2024-13-45\n---\ntext",
        "json.md": b"{\n'x': 1\n}\ntext",
        "toml.md": b"+++\nx = \n+++\ntext",
        "latin1.md": b"caf\xe9",
        "binary.md": bytes(range(256)) * 20,
        "nul.md": b"# one\0two\n\ntext that goes on",
        "bomb.md": b"---\na: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in b"abcdefg"
        )
        + b"---\n",
        "surrogate.md": b'{\n"title": "\\ud800", "x": NaN, "y": 1e999\n}\n',
        "class.md": b"---\nclassification: top secret\n---\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    fine = {"prose.md": b"---\nprose\n---\nmore", "list.md": b"---\n- x\n---\n", "empty.md": b""}
    for name, content in fine.items():
        (folder / name).write_bytes(content)
    report = world.run(folder)
    assert counts(report) == (13, 13, 0, 0, 0, 0)
    rows = world.documents()
    wrong = {i for i, row in rows.items() if "extraction_error" in row["metadata"]}
    assert wrong == {f"notes:{name}" for name in contents} - {"notes:surrogate.md"}
    assert {failure.path for failure in report.failures} == {
        f"{folder}/{doc_id.removeprefix('notes:')}" for doc_id in wrong
    }
    assert counts(world.run(folder)) == (13, 0, 0, 13, 0, 0)


def test_a_large_document_is_hashed_and_read_in_part(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "notes"
    write(folder / "large.md", "# Large\n" + "text " * (11 * 1024 * 1024))
    world.settings = DocumentSettings(max_bytes=100 * 1024 * 1024)
    assert counts(world.run(folder)) == (1, 1, 0, 0, 0, 0)
    row = world.documents()["notes:large.md"]
    assert row["file_size"] == (folder / "large.md").stat().st_size
    assert row["metadata"]["analysed_bytes"] == 1024 * 1024
    assert row["metadata"]["title"] == "Large"
    world.settings = DocumentSettings(max_bytes=1000)
    os.truncate(folder / "large.md", 2000)
    report = world.run(folder)
    assert counts(report) == (1, 0, 1, 0, 0, 0)
    assert "max_bytes" in world.metadata("notes:large.md")["extraction_error"]
    assert world.metadata("notes:large.md")["title"] == "large"


# Announcements


def test_a_batch_with_changes_is_announced_once(world: World, notes: Path):
    world.run(notes)
    (message,) = world.rows("SELECT * FROM messages")
    assert message["sender"], message["message_type"] == ("Helena", "BATCH_PROCESSED")
    assert (message["recipient"], message["importance"]) == ("Team", 0.5)
    assert message["context"]["new"] == 3
    assert message["context"]["namespaces"] == ["notes"]
    assert "3 new" in message["content"]
    (context,) = world.rows("SELECT * FROM agent_contexts")
    key = (context["agent_name"], context["project_id"], context["context_key"])
    assert key == ("Helena", "batch_processing", "last_processed")
    world.run(notes)
    (notes / "a.md").unlink()
    world.run(notes)
    contents = [row["content"] for row in world.rows("SELECT * FROM messages ORDER BY timestamp")]
    assert len(contents) == 2
    assert "1 missing" in contents[1]
    assert len(world.rows("SELECT * FROM agent_contexts")) == 1


def test_documents_can_be_announced_one_by_one(world: World, notes: Path):
    world.settings = DocumentSettings(announce="document")
    world.run(notes)
    messages = world.rows("SELECT * FROM messages")
    assert {row["context"]["es_doc_id"] for row in messages} == set(world.documents())
    assert len(world.rows("SELECT * FROM agent_contexts")) == 1
    (notes / "a.md").unlink()
    world.run(notes)
    assert len(world.rows("SELECT * FROM messages")) == 4


def test_announcements_can_be_switched_off(world: World, notes: Path):
    world.settings = DocumentSettings(announce="none")
    world.run(notes)
    assert world.rows("SELECT * FROM messages") == []
    assert world.rows("SELECT * FROM agent_contexts") == []


# Pruning


def test_pruning_deletes_marked_documents_and_says_what_goes_along(
    world: World, notes: Path, helena_dsn: str
):
    world.run(notes)
    for doc_id in ("notes:a.md", "notes:a.md", "notes:sub/b.md"):
        world.connection.execute(
            "INSERT INTO es_document_usage_log (es_doc_id, accessed_by) VALUES (%s, 'me')", [doc_id]
        )
    (notes / "a.md").unlink()
    world.run(notes)
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        known = DocumentRegistry(connection)
        facts: dict[str, Any] = {"settings": world.settings, "host": "here", "registry": known}
        assert plan_prune([notes / "sub"], **facts).documents == ()
        plan = plan_prune([notes], **facts)
        assert (plan.documents, plan.usage_rows) == (("notes:a.md",), 2)
        assert prune(plan, known) == 1
    assert set(world.documents()) == {"notes:sub/b.md", "notes:sub/c.markdown"}
    assert len(world.rows("SELECT * FROM es_document_usage_log")) == 1


def test_a_document_that_came_back_is_not_pruned(world: World, notes: Path, helena_dsn: str):
    world.run(notes)
    (notes / "a.md").unlink()
    world.run(notes)
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        known = DocumentRegistry(connection)
        plan = plan_prune([notes], settings=world.settings, host="here", registry=known)
        write(notes / "a.md", "# Alpha\n")
        world.run(notes)
        assert prune(plan, known) == 0
    assert len(world.documents()) == 3


# The corpus


@needs_corpus
def test_the_corpus_is_indexed_completely(world: World):
    report = world.run(CORPUS)
    files = sum(1 for path in CORPUS.rglob("*.md"))
    assert counts(report) == (files, files, 0, 0, 0, 0)
    assert report.failures == ()
    assert len(world.documents()) == files
    accepted = world.runtime.spool.conservation().accepted
    assert counts(world.run(CORPUS)) == (files, 0, 0, files, 0, 0)
    assert world.runtime.spool.conservation().accepted == accepted


@needs_corpus
def test_touching_editing_and_deleting_is_told_apart(world: World, tmp_path: Path):
    folder = tmp_path / "hugo"
    shutil.copytree(CORPUS, folder)
    files = sorted(folder.rglob("*.md"))
    world.run(folder)
    for path in files[:3]:
        os.utime(path)
    for path in files[3:5]:
        path.write_text(path.read_text(encoding="utf-8") + "more", encoding="utf-8")
    files[5].unlink()
    left = len(files) - 1
    assert counts(world.run(folder)) == (left, 0, 2, left - 2, 1, 0)
