"""`helena process-pending`: bring documents, and everything that is queued, into the database."""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, Yes, with_common_options
from helena_cli.errors import (
    DatabaseRefused,
    DatabaseUnreachable,
    ExitCode,
    HelenaError,
    Refused,
    UsageError,
)

if TYPE_CHECKING:
    from helena_cli.cli.run_summary import Summary
    from helena_cli.database.backlog import BacklogReport
    from helena_cli.database.connection import Connection
    from helena_cli.documents.json_files import PendingReport
    from helena_cli.documents.prune import PrunePlan
    from helena_cli.documents.reconcile import Report
    from helena_cli.runtime import Runtime

Paths = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH", help="Folders and documents; else [documents] roots."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would happen; claim, queue and write nothing.")
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Then delete for good what is marked as missing.")
]
AllowMissing = Annotated[
    bool, typer.Option("--allow-missing", help="Mark missing documents even when they are many.")
]
AllowAnySql = Annotated[
    bool,
    typer.Option(
        "--allow-any-sql",
        help="Apply files of the SQL backlog whatever they say, not only rows for known tables.",
    ),
]


@with_common_options
def command(
    common: Common,
    *,
    paths: Paths = None,
    dry_run: DryRun = False,
    prune: Prune = False,
    allow_missing: AllowMissing = False,
    allow_any_sql: AllowAnySql = False,
    yes: Yes = False,
) -> ExitCode:
    """Take in pending files, index new, changed and missing documents, write all that is queued.

    Pending files are those of operations, of tasks, and of the SQL backlog: see [pending]. Without
    PATH and without configured roots it looks at no documents but those of pending tasks. It waits
    until nothing more can be written, by whichever process of this host; what has to wait for
    something else is reported as remaining.
    """
    from helena_cli.cli import run_summary
    from helena_cli.runtime import Runtime

    settings = common.settings()
    places = _places(paths or settings.documents.roots)
    _say_what_is_no_document(places, settings.documents.extensions)
    if prune and not places:
        raise UsageError(
            "--prune does not know where to look.",
            remedy="Give a PATH, or set [documents] roots.",
        )
    with Runtime(settings) as runtime:
        run = _Run(runtime, places, dry_run=dry_run)
        error: HelenaError | None = None
        try:
            run.work(allow_missing=allow_missing, allow_any_sql=allow_any_sql)
            if prune:
                run.prune(yes=yes, may_ask=not common.json)
        except (DatabaseUnreachable, DatabaseRefused, Refused) as caught:
            error = caught
        summary = run.summary()
    run_summary.show(summary, as_json=common.json)
    if error is not None:
        raise error
    return summary.exit_code()


def _places(paths: Sequence[str]) -> list[Path]:
    if not all(path.strip() for path in paths):
        # An unset variable in a script; Path("") would be the current directory.
        raise UsageError("A PATH is empty.", remedy="Give a folder or a document, or no PATH.")
    return [Path(path) for path in paths]


def _say_what_is_no_document(places: Sequence[Path], extensions: Sequence[str]) -> None:
    """A pattern of the shell gives other files too: they are no error."""
    endings = tuple(extension.lower() for extension in extensions)
    others = [p for p in places if os.path.isfile(p) and not p.name.lower().endswith(endings)]
    if others:
        more = f" and {render.many(len(others) - 1, 'more file')}" if len(others) > 1 else ""
        known = ", ".join(extensions)
        render.say(f"By the name no document ([documents] extensions: {known}): {others[0]}{more}")


class _Run:
    """One run, and what it knows so far; `summary` tells it, also after an error."""

    def __init__(self, runtime: "Runtime", places: Sequence[Path], *, dry_run: bool) -> None:
        self._runtime = runtime
        self._places = places
        self._dry_run = dry_run
        self._host = platform.node()
        self._started = time.monotonic()
        self._before = runtime.spool.conservation()
        self._flushes_before = runtime.spool.flushes().count
        self._stuck_before = _stuck(runtime)
        self._report: Report | None = None
        self._files: PendingReport | None = None
        self._backlog: BacklogReport | None = None
        self._plan: PrunePlan | None = None
        self._pruned = 0
        self._unreachable = False

    def work(self, *, allow_missing: bool, allow_any_sql: bool) -> None:
        """Queue what lies about and what has changed, and wait until the queue is written."""
        from helena_cli.database import schema

        try:
            with self._runtime.connection("process-pending") as connection:
                # Before anything is queued, and also when there is nothing to queue.
                schema.target_id(connection)
                if not self._dry_run:
                    self._runtime.engine.start()
                self._files = self._take_in_operations()
                self._files += self._index(connection, allow_missing=allow_missing)
                self._backlog = self._apply_backlog(connection, allow_any_sql=allow_any_sql)
            if not self._dry_run:
                # Whoever has mended a table wants to see that, and not the next try in a minute.
                self._runtime.spool.hurry()
                with render.progress("Writing what is queued"):
                    self._runtime.drain()
        except DatabaseUnreachable:
            self._unreachable = True
            raise

    def prune(self, *, yes: bool, may_ask: bool) -> None:
        """Delete what is marked as missing, after a look at it. Raises Refused."""
        from helena_cli.database.registry import DocumentRegistry
        from helena_cli.documents.prune import plan_prune, prune

        with self._runtime.connection("process-pending") as connection:
            registry = DocumentRegistry(connection)
            settings = self._runtime.settings.documents
            self._plan = plan = plan_prune(
                self._places, settings=settings, host=self._host, registry=registry
            )
        if self._dry_run or not plan.documents:
            return
        _ask(plan, yes=yes, may_ask=may_ask)
        # Nothing that another process writes meanwhile may bring a row back.
        self._runtime.become_flusher()
        # A person may take long to answer: nobody else waits for the connection meanwhile.
        with self._runtime.connection("process-pending") as connection:
            self._pruned = prune(plan, DocumentRegistry(connection))

    def summary(self) -> "Summary":
        """What has happened so far."""
        from helena_cli.cli.run_summary import Summary

        spool = self._runtime.spool
        flushes = spool.flushes()
        return Summary(
            report=self._report,
            files=self._files,
            backlog=self._backlog,
            before=self._before,
            after=spool.conservation(),
            flushes=flushes.count - self._flushes_before,
            recent=flushes,
            stuck=_stuck(self._runtime),
            stuck_before=self._stuck_before,
            waiting=tuple(lane for lane in spool.lanes() if lane.reason),
            plan=self._plan,
            pruned=self._pruned,
            seconds=time.monotonic() - self._started,
            dry_run=self._dry_run,
            unreachable=self._unreachable,
            places=tuple(map(str, self._places)),
            spool=str(spool.path),
        )

    def _take_in_operations(self) -> "PendingReport":
        from helena_cli.documents.pending import drain_operation_files

        settings = self._runtime.settings
        with render.progress("Taking in operation files"):
            return drain_operation_files(
                Path(settings.pending.operations),
                self._runtime.spool,
                max_bytes=settings.batch.max_operation_bytes,
                dry_run=self._dry_run,
            )

    def _index(self, connection: "Connection", *, allow_missing: bool) -> "PendingReport":
        """Bring the documents of the places and of the tasks up to date, in one pass."""
        from helena_cli.database.registry import DocumentRegistry
        from helena_cli.documents.reconcile import reconcile
        from helena_cli.documents.tasks import Tasks

        settings = self._runtime.settings
        with Tasks(
            Path(settings.pending.tasks),
            base=settings.config_file.parent if settings.config_file else Path(),
            max_bytes=settings.batch.max_operation_bytes,
            dry_run=self._dry_run,
        ) as tasks:
            registry = DocumentRegistry(connection)
            documents = settings.documents
            if tasks.documents:
                documents = tasks.select(documents, registry.roots(self._host), self._places)
            if self._places or tasks.documents:
                with render.progress("Looking at documents") as progress:
                    self._report = reconcile(
                        [*self._places, *tasks.documents],
                        settings=documents,
                        host=self._host,
                        registry=registry,
                        queue=self._runtime.spool,
                        dry_run=self._dry_run,
                        allow_missing=allow_missing,
                        progress=progress,
                    )
            return tasks.settle(self._report)

    def _apply_backlog(self, connection: "Connection", *, allow_any_sql: bool) -> "BacklogReport":
        from helena_cli.database.backlog import drain_backlog

        settings = self._runtime.settings
        with render.progress("Applying the SQL backlog") as progress:
            return drain_backlog(
                Path(settings.pending.backlog),
                connection,
                tables=settings.pending.tables,
                max_bytes=settings.batch.max_bytes,
                allow_any_sql=allow_any_sql,
                dry_run=self._dry_run,
                progress=progress,
            )


def _stuck(runtime: "Runtime") -> int:
    """How many queued operations have to wait for something else than a flush."""
    return max(0, runtime.spool.queue().total - runtime.spool.pressure().count)


def _ask(plan: "PrunePlan", *, yes: bool, may_ask: bool) -> None:
    documents = render.many(len(plan.documents), "document")
    usage = render.many(plan.usage_rows, "row")
    question = f"Delete {documents}, and {usage} of the usage log with them, for good?"
    if yes:
        return
    if not may_ask:
        raise Refused(question, remedy="Nothing was deleted. To do it: the same with --yes.")
    render.print_table(("marked as missing",), ((doc_id,) for doc_id in plan.documents))
    render.confirm(question, yes=False)
