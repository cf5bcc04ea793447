"""`helena clear-locks`: free a stuck database with the smallest actions that work."""

import re
from typing import Annotated

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, Yes, with_common_options
from helena_cli.errors import ExitCode, UsageError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}

OlderThan = Annotated[
    str | None,
    typer.Option(
        "--older-than",
        metavar="TIME",
        help="End only what has been in its state for so long: 30s, 5m, 2h; a number is seconds.",
    ),
]
User = Annotated[
    list[str] | None,
    typer.Option("--user", metavar="USER", help="End only sessions of this user; repeatable."),
]
Pid = Annotated[
    list[int] | None,
    typer.Option(
        "--pid", metavar="PID", help="End only this session, even if it blocks nobody; repeatable."
    ),
]
Table = Annotated[
    list[str] | None,
    typer.Option(
        "--table",
        metavar="TABLE",
        help="End only sessions with locks of this table, and clean it in any case; repeatable.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")]
NoVacuum = Annotated[
    bool, typer.Option("--no-vacuum", help="Leave out GIN pending lists and VACUUM (ANALYZE).")
]
All = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Also end who idles in a transaction, or runs a query, for 5 minutes (or --older-than)"
        " and blocks nobody yet.",
    ),
]


@with_common_options
def command(
    common: Common,
    *,
    older_than: OlderThan = None,
    user: User = None,
    pid: Pid = None,
    table: Table = None,
    dry_run: DryRun = False,
    no_vacuum: NoVacuum = False,
    everything: All = False,
    yes: Yes = False,
) -> ExitCode:
    """Free a stuck database: show who waits for whom, ask, and end as little as possible.

    A statement that waits for a strong lock and holds up others is cancelled, or a query at the
    root of the blockade; a session that idles in a transaction is terminated, a prepared
    transaction rolled back. Then the tables concerned are cleaned: GIN pending lists, VACUUM
    (ANALYZE). Sessions of other databases, of the server itself, and VACUUM are left alone. Exits
    with 1 when something still blocks, or what was named could not be ended or cleaned. What was
    ended is written to clear-locks.log in the state directory.
    """
    from helena_cli.cli.rescue import Rescue
    from helena_cli.database import locks
    from helena_cli.database.relief import Scope
    from helena_cli.runtime import Runtime

    settings = common.settings()
    limit = None if older_than is None else _seconds(older_than)
    with Runtime(settings) as runtime:
        server = locks.reach(runtime.direct_target())
        with server.connection:
            tables = locks.relations(server, table) if table else None
            scope = Scope(frozenset(pid or ()), frozenset(user or ()), tables, limit, everything)
            run = Rescue(runtime, server, scope, show=not common.json, vacuum=not no_vacuum)
            error = run.work(dry_run=dry_run, yes=yes, may_ask=not common.json)
            if common.json:
                render.print_json(run.document())
    if error is not None:
        raise error
    return ExitCode.PARTIAL if run.done_in_part and not dry_run else ExitCode.DONE


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(ms|min|[smhd])?\s*", text)
    whole = re.fullmatch(r"(?:\d+(?:\.\d+)?\s*(?:ms|min|[smhd])?\s*)+", text.strip())
    if whole is None:
        raise UsageError(
            f"--older-than {text!r} is not a length of time.",
            remedy="Write it like 30s, 5m, 2h or 1h30m; a plain number is seconds.",
        )
    return sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
