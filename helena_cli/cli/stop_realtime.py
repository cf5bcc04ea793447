"""`helena stop-realtime`: stop the old real-time writers and keep them stopped; `--undo` them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, Yes, with_common_options
from helena_cli.errors import ExitCode, HelenaError, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helena_cli.host.stop_plan import Item
    from helena_cli.host.stop_record import Entry, Record
    from helena_cli.host.stopping import Report
    from helena_cli.host.supervisors import Job
    from helena_cli.settings import Settings

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what was found, and stop nothing.")]
Undo = Annotated[
    bool, typer.Option("--undo", help="Bring back what was stopped, as it was; the rollback.")
]


@with_common_options
def command(
    common: Common, undo: Undo = False, dry_run: DryRun = False, yes: Yes = False
) -> ExitCode:
    """Stop the old real-time writers, and keep them stopped.

    Finds them by the script or module that they run, see [realtime], and by their jobs under
    systemd, launchd, supervisord and cron. Jobs are stopped through their supervisor and kept from
    starting; processes get TERM, then KILL, with all that they started. It needs no database.
    """
    from helena_cli.batch.lease import Lease
    from helena_cli.host.stop_record import Record
    from helena_cli.runtime import Runtime

    settings = common.settings()
    # Only the directory: neither queue nor database is touched.
    state_dir = Runtime(settings).state_dir
    lease = Lease(state_dir / "stop-realtime.lock")
    if not lease.acquire():
        raise HelenaError(
            "Another helena stop-realtime is at work.", remedy="Wait until it is done."
        )
    try:
        work = _undo if undo else _stop
        return work(common, settings, Record(state_dir), dry_run=dry_run, yes=yes)
    finally:
        lease.release()


def _stop(
    common: Common, settings: "Settings", record: "Record", *, dry_run: bool, yes: bool
) -> ExitCode:
    from helena_cli.host.stop_plan import make_plan
    from helena_cli.host.stopping import Stopping
    from helena_cli.host.supervisors import Wanted

    wanted = Wanted(settings.realtime.processes, settings.realtime.services)
    with render.progress("Looking for real-time writers"):
        plan = make_plan(wanted)
        items = plan.items()
    if not common.json:
        _show_plan(items, (*wanted.processes, *wanted.services))
    if dry_run or not items:
        if common.json:
            render.print_json(_document(items, None))
        return ExitCode.DONE
    if common.json and not yes:
        render.print_json(_document(items, None))
    _ask(common, f"Stop {_counted(items)}, and keep that stopped?", yes=yes)
    stopping = Stopping(
        plan,
        wanted,
        record,
        grace=settings.realtime.grace,
        quiet=settings.realtime.quiet,
    )
    try:
        with render.progress("Stopping, and looking whether something comes back"):
            report = stopping.apply()
    except KeyboardInterrupt:
        if record.entries():
            render.say(
                "What was stopped is recorded; to see it: helena stop-realtime --undo --dry-run"
            )
        raise
    if common.json:
        render.print_json(_document(items, report))
    else:
        _show_report(report, record)
    return ExitCode.PARTIAL if report.remaining or report.failures else ExitCode.DONE


def _undo(
    common: Common, settings: "Settings", record: "Record", *, dry_run: bool, yes: bool
) -> ExitCode:
    from helena_cli.host.undoing import undo

    entries = record.entries()
    if not common.json:
        _show_record(entries)
    if dry_run or not entries:
        if common.json:
            render.print_json(_undo_document(entries))
        return ExitCode.DONE
    if common.json and not yes:
        render.print_json(_undo_document(entries))
    _ask(common, "Bring back what is listed?", yes=yes)
    restored, failures = undo(record, entries)
    if common.json:
        from msgspec import to_builtins

        done = {"restored": to_builtins(restored), "failures": to_builtins(failures)}
        render.print_json(_undo_document(entries) | done | {"remaining": len(failures)})
    else:
        for back in restored:
            how = f"pid {back.pid}" if back.pid else f"{back.supervisor} {back.job}"
            print(f"Back    {how}: {render.plain(back.command)}")
        for failure in failures:
            _show_failure(failure.command, failure.reason, failure.remedy)
    return ExitCode.PARTIAL if failures else ExitCode.DONE


def _ask(common: Common, question: str, *, yes: bool) -> None:
    """Whether to go on. Raises Refused."""
    if common.json and not yes:
        raise Refused(
            "Nothing was changed.", remedy="Look at the plan, then run the same with --yes."
        )
    render.confirm(question, yes=yes)


# What was found


def _show_plan(items: "Sequence[Item]", names: "Sequence[str]") -> None:
    if not items:
        meant = ", ".join(names) or "nothing, for [realtime] names nothing"
        render.say(f"Nothing runs, or would be started, of: {meant}.")
        return
    render.print_table(
        ("pid", "user", "supervisor", "with it", "what it runs", ""),
        (
            (
                item.pid or "-",
                item.user or "",
                _kept_by(item.supervisor, item.job),
                f"+ {item.children}" if item.children else "",
                item.command,
                item.obstacle or "",
            )
            for item in items
        ),
        right=("pid",),
    )


def _kept_by(supervisor: str | None, job: str | None) -> str:
    return f"{supervisor}: {job}" if supervisor else "none"


def _counted(items: "Sequence[Item]") -> str:
    running = sum(item.pid is not None and item.obstacle is None for item in items)
    jobs = len({(item.supervisor, item.job, item.command) for item in items if item.supervisor})
    counts = [
        *([render.many(running, "process", "processes")] if running else []),
        *([render.many(jobs, "job")] if jobs else []),
    ]
    return " and ".join(counts) or "what can be stopped"


def _document(items: "Sequence[Item]", report: "Report | None") -> dict[str, Any]:
    from msgspec import to_builtins

    return {
        "found": to_builtins(items),
        "stopped": to_builtins(report.stopped) if report else [],
        "disabled": [_disabled(job) for job in report.disabled] if report else [],
        "failures": to_builtins(report.failures) if report else [],
        "notes": report.notes if report else [],
        "remaining": report.remaining if report else len(items),
    }


def _disabled(job: "Job") -> dict[str, Any]:
    return {
        "supervisor": job.supervisor,
        "job": job.name,
        "command": job.command,
        "undo": job.undo,
    }


# What was done


def _show_report(report: "Report", record: "Record") -> None:
    print()
    for stopped in report.stopped:
        print(f"Stopped   pid {stopped.pid}, {stopped.result}: {render.plain(stopped.command)}")
    for job in report.disabled:
        print(f"Disabled  {job.supervisor} {job.name}: {render.plain(job.command)}")
        print(f"          by hand it comes back with: {render.plain(job.undo)}")
    for failure in report.failures:
        _show_failure(failure.what, failure.reason, failure.remedy)
    print(f"Remaining {report.remaining}")
    for note in report.notes:
        render.say(f"Note: {render.plain(note)}")
    if record.entries():
        render.say("To bring back what was stopped: helena stop-realtime --undo")


def _show_failure(what: str, reason: str, remedy: str) -> None:
    print(f"Not done  {render.plain(what)}: {render.plain(reason)}")
    print(f"          what to do: {render.plain(remedy)}")


# What was recorded


def _show_record(entries: "Sequence[Entry]") -> None:
    if not entries:
        render.say("Nothing is stopped that --undo could bring back.")
        return
    render.print_table(
        ("supervisor", "what it runs"),
        ((_kept_by(line["supervisor"], line["job"]), line["command"]) for line in _lines(entries)),
    )


def _undo_document(entries: "Sequence[Entry]") -> dict[str, Any]:
    return {
        "found": _lines(entries),
        "stopped": [],
        "disabled": [],
        "restored": [],
        "failures": [],
        "remaining": len(entries),
    }


def _lines(entries: "Sequence[Entry]") -> list[dict[str, Any]]:
    from helena_cli.host.stop_record import HeldJob

    return [
        {"pid": None, "command": entry.job.command}
        | {"supervisor": entry.job.supervisor, "job": entry.job.name}
        if isinstance(entry, HeldJob)
        else {"pid": entry.pid, "command": entry.command, "supervisor": None, "job": None}
        for entry in entries
    ]
