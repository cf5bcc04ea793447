"""`helena dead-letters`: what the database refused, and what becomes of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, Yes, with_common_options
from helena_cli.errors import ExitCode, Refused, UsageError

if TYPE_CHECKING:
    from helena_cli.batch.letters import DeadLetter
    from helena_cli.batch.spool import Spool

app = typer.Typer(
    help="Look at the operations that the database refused; retry or drop them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Ids = Annotated[list[int] | None, typer.Argument(metavar="ID", help="Ids, as list shows them.")]
Table = Annotated[
    str | None, typer.Option("--table", metavar="TABLE", help="All dead letters of this table.")
]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]


@app.command("list")
@with_common_options
def list_command(common: Common, table: Table = None) -> ExitCode:
    """List the dead letters, the oldest first, with the reason of each."""
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        letters = runtime.spool.dead_letters(table=table)
    if common.json:
        render.print_json({"dead_letters": [_document(letter) for letter in letters]})
    elif letters:
        _print_list(letters)
        render.say("Next: helena dead-letters show ID; then retry or drop, with ids or --all.")
    else:
        render.say("There are no dead letters.")
    return ExitCode.DONE


@app.command("show")
@with_common_options
def show_command(
    common: Common, ids: Ids = None, table: Table = None, everything: All = False
) -> ExitCode:
    """Show dead letters with all of their data."""
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        letters = _chosen(runtime.spool, ids, table, everything)
    if common.json:
        render.print_json({"dead_letters": [_document(letter) for letter in letters]})
    else:
        for letter in letters:
            _print_letter(letter)
    return ExitCode.DONE


@app.command("retry")
@with_common_options
def retry_command(
    common: Common, ids: Ids = None, table: Table = None, everything: All = False
) -> ExitCode:
    """Put dead letters back at the end of the queue, under new ids."""
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        letters = _chosen(runtime.spool, ids, table, everything)
        count = runtime.spool.retry([letter.id for letter in letters])
        running = runtime.flusher_running()
    if common.json:
        render.print_json({"retried": count})
        return ExitCode.DONE
    print(f"{render.many(count, 'dead letter')} put back into the queue.")
    writer = "The running flusher writes" if running else "Next: helena process-pending writes"
    render.say(f"{writer} what is queued.")
    return ExitCode.DONE


@app.command("drop")
@with_common_options
def drop_command(
    common: Common,
    ids: Ids = None,
    table: Table = None,
    everything: All = False,
    yes: Yes = False,
) -> ExitCode:
    """Delete dead letters for good."""
    from helena_cli.runtime import Runtime

    with Runtime(common.settings()) as runtime:
        letters = _chosen(runtime.spool, ids, table, everything)
        plan = [_document(letter) for letter in letters]
        if letters and common.json and not yes:
            render.print_json({"dead_letters": plan, "dropped": 0})
            raise Refused("Nothing was deleted.", remedy="Run the same command with --yes.")
        if letters and not yes:
            _print_list(letters)
            noun = render.many(len(letters), "dead letter")
            render.confirm(f"Delete {noun} for good?", yes=yes)
        count = runtime.spool.drop([letter.id for letter in letters])
    if common.json:
        render.print_json({"dead_letters": plan, "dropped": count})
    else:
        print(f"{render.many(count, 'dead letter')} deleted.")
    return ExitCode.DONE


def _chosen(
    spool: "Spool", ids: Sequence[int] | None, table: str | None, everything: bool
) -> "list[DeadLetter]":
    """The dead letters that are meant. Raises UsageError when that is unclear, or they are gone."""
    if (bool(ids) + (table is not None) + everything) != 1:
        raise UsageError(
            "It is not clear which dead letters are meant.",
            remedy="Give ids, or --table TABLE, or --all. Ids: helena dead-letters list.",
        )
    if not ids:
        return spool.dead_letters(table=table)
    letters = spool.dead_letters(ids)
    missing = sorted(set(ids) - {letter.id for letter in letters})
    if missing:
        raise UsageError(
            f"There is no dead letter {', '.join(map(str, missing))}.",
            remedy="See which there are: helena dead-letters list.",
        )
    return letters


def _document(letter: "DeadLetter") -> dict[str, Any]:
    import json

    return {
        "id": letter.id,
        "kind": letter.kind,
        "table": letter.table,
        "data": json.loads(letter.data),
        "sqlstate": letter.sqlstate,
        "message": letter.message,
        "constraint": letter.constraint,
        "attempts": letter.attempts,
        "failed_at": render.instant(letter.failed_at),
    }


def _print_list(letters: "Sequence[DeadLetter]") -> None:
    render.print_table(
        ("id", "kind", "table", "failed", "tries", "sqlstate", "reason"),
        (
            (
                letter.id,
                letter.kind,
                letter.table,
                render.local_time(letter.failed_at),
                letter.attempts,
                letter.sqlstate,
                letter.message,
            )
            for letter in letters
        ),
        right=("tries",),
    )


def _print_letter(letter: "DeadLetter") -> None:
    import msgspec

    tries = render.many(letter.attempts, "time")
    render.print_facts(
        [
            ("id", letter.id),
            ("operation", f"{letter.kind} {letter.table}"),
            ("failed", f"{render.local_time(letter.failed_at)}, tried {tries}"),
            ("reason", f"{letter.message} (SQLSTATE {letter.sqlstate or 'unknown'})"),
            ("constraint", letter.constraint or "-"),
        ]
    )
    for line in msgspec.json.format(letter.data, indent=2).decode().split("\n"):
        print(render.plain(line))
    print()
