"""What a run of `process-pending` has done: for programs, for a person, and as an exit code."""

from collections.abc import Iterator
from typing import Any

from msgspec import Struct, to_builtins

from helena_cli.batch.ledger import Conservation, Flushes, Lane
from helena_cli.cli import render
from helena_cli.database.backlog import BacklogFailure, BacklogReport
from helena_cli.documents.json_files import PendingReport
from helena_cli.documents.outbox import Failure
from helena_cli.documents.prune import PrunePlan
from helena_cli.documents.reconcile import Report
from helena_cli.errors import ExitCode

#: Counts of operation and task files.
FILES = ("found", "accepted", "failed", "skipped")

#: Counts of the files of the SQL backlog, and of their transactions.
BACKLOG = ("found", "applied", "failed", "skipped", "empty", "transactions")


class Summary(Struct, frozen=True):
    """One run. The counters before and after it are those of the whole host."""

    #: None when no document was looked at.
    report: Report | None
    #: Operation and task files; None when the run did not get so far.
    files: PendingReport | None
    #: None when the run did not get so far.
    backlog: BacklogReport | None
    before: Conservation
    after: Conservation
    #: Flushes during this run.
    flushes: int
    #: The numbers of the last flushes, some of them perhaps earlier than this run.
    recent: Flushes
    #: Queued operations that have to wait: for their table, or for the row they refer to.
    stuck: int
    #: How many of them had to wait before this run already.
    stuck_before: int
    waiting: tuple[Lane, ...]
    plan: PrunePlan | None
    pruned: int
    seconds: float
    dry_run: bool
    unreachable: bool
    #: Where documents were to be looked at.
    places: tuple[str, ...]
    spool: str

    def operations(self) -> dict[str, int]:
        """What became of operations during this run, and how many are queued now."""
        names = ("accepted", "written", "coalesced", "dead")
        # A dead letter that somebody drops meanwhile must not make a count negative.
        changes = {
            name: max(0, getattr(self.after, name) - getattr(self.before, name)) for name in names
        }
        return {**changes, "remaining": self.after.spooled}

    def failures(self) -> list[Failure | BacklogFailure]:
        """What is wrong with files and folders, in the order in which they were looked at."""
        parts = (self.files, self.report, self.backlog)
        return [failure for part in parts if part is not None for failure in part.failures]

    def exit_code(self) -> ExitCode:
        """PARTIAL when a file or an operation of this run did not get where it should."""
        report = self.report
        incomplete = report is not None and (report.failed or report.incomplete)
        unusable = any(part is not None and part.failed for part in (self.files, self.backlog))
        stuck = self.operations()["dead"] or self.stuck > self.stuck_before
        return ExitCode.PARTIAL if incomplete or unusable or stuck else ExitCode.DONE


def show(summary: Summary, *, as_json: bool) -> None:
    """The result on stdout, what is to be said about it on stderr."""
    if as_json:
        render.print_json(_document(summary))
    else:
        _print(summary)
    if summary.unreachable and summary.after.spooled:
        render.say(
            f"Still queued: {render.many(summary.after.spooled, 'operation')}, in {summary.spool}. "
            "The next helena process-pending, or any program that uses Helena, writes it."
        )


def _document(summary: Summary) -> dict[str, Any]:
    """The contract with other programs: keys may be added, never renamed."""
    report, files, backlog, plan = summary.report, summary.files, summary.backlog, summary.plan
    names = ("found", "new", "changed", "unchanged", "missing", "failed")
    return {
        "documents": {name: getattr(report, name) if report else 0 for name in names},
        "operation_files": {name: getattr(files, name) if files else 0 for name in FILES},
        "backlog": {name: getattr(backlog, name) if backlog else 0 for name in BACKLOG},
        "operations": summary.operations(),
        "flushes": summary.flushes,
        "seconds": round(summary.seconds, 3),
        "failures": to_builtins(summary.failures()),
        "dry_run": summary.dry_run,
        "prune": plan and {**to_builtins(plan), "deleted": summary.pruned},
    }


def _print(summary: Summary) -> None:
    render.print_facts(_facts(summary))
    if failures := summary.failures():
        render.print_heading("What is wrong with files and folders")
        render.print_table(("path", "reason"), ((one.path, one.reason) for one in failures))
    if summary.waiting:
        render.print_heading("Tables that cannot be written now")
        render.print_table(
            ("table", "operations", "reason", "what to do"),
            ((o.table, f"{o.operations:,}", o.reason, o.remedy) for o in summary.waiting),
            right=("operations",),
        )
    if summary.operations()["dead"]:
        render.say("The database refused operations. Why: helena dead-letters list")


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    report, files, backlog = summary.report, summary.files, summary.backlog
    if summary.dry_run:
        yield "Dry run", "nothing was claimed, queued or written"
    if files is not None and files.found:
        yield "Pending files", _files(files)
    if report is not None:
        yield "Documents", _documents(report)
    elif summary.places:
        yield "Documents", f"not looked at: {', '.join(summary.places)}"
    else:
        yield "Documents", "not looked at: neither a PATH nor [documents] roots"
    if backlog is not None and backlog.found:
        yield "SQL backlog", _backlog(backlog)
    yield "Operations", _operations(summary)
    if summary.flushes:
        yield "Flushes", _flushes(summary)
    if summary.plan is not None:
        yield "Prune", _prune(summary, summary.plan)
    yield "Time", render.duration(summary.seconds)


def _files(files: PendingReport) -> str:
    text = f"{files.found:,} found: {files.accepted:,} accepted, {files.failed:,} failed"
    return f"{text}, {files.skipped:,} skipped" if files.skipped else text


def _backlog(backlog: BacklogReport) -> str:
    counts = [f"{backlog.applied:,} applied", f"{backlog.failed:,} failed"]
    counts += [f"{backlog.skipped:,} applied before"] if backlog.skipped else []
    counts += [f"{backlog.empty:,} empty"] if backlog.empty else []
    transactions = render.many(backlog.transactions, "transaction")
    return f"{backlog.found:,} found: {', '.join(counts)}; {transactions}"


def _documents(report: Report) -> str:
    text = (
        f"{report.found:,} found: {report.new:,} new, {report.changed:,} changed, "
        f"{report.unchanged:,} unchanged, {report.failed:,} failed; {report.missing:,} missing"
    )
    return f"{text}, {report.unmarked:,} of them not marked" if report.unmarked else text


def _operations(summary: Summary) -> str:
    if summary.dry_run:
        return f"{render.many(summary.after.spooled, 'operation')} queued, and left so"
    counts = summary.operations()
    text = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"{text} ({_stuck(summary)})" if summary.stuck else text


def _stuck(summary: Summary) -> str:
    """What the operations that remain have to wait for."""
    for_table = min(summary.stuck, sum(lane.operations for lane in summary.waiting))
    for_row = summary.stuck - for_table
    reasons = [f"{for_table:,} for a table"] if for_table else []
    reasons += [f"{for_row:,} for the row of another table"] if for_row else []
    return f"{summary.stuck:,} must wait: {', '.join(reasons)}"


def _flushes(summary: Summary) -> str:
    recent = summary.recent
    return (
        f"{summary.flushes:,}, p50 {render.milliseconds(recent.p50_ms)}, "
        f"p99 {render.milliseconds(recent.p99_ms)}, "
        f"{render.number(recent.operations_per_second)} operations/s"
    )


def _prune(summary: Summary, plan: PrunePlan) -> str:
    if not plan.documents:
        return "no document is marked as missing"
    documents = render.many(len(plan.documents), "document")
    rows = f"{documents} marked as missing, {render.many(plan.usage_rows, 'row')} of usage"
    return f"{rows}; {summary.pruned:,} deleted" if summary.pruned else f"{rows}; none deleted"
