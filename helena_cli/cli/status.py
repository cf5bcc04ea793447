"""`helena status`: the queue, its flusher and flushes, the database, and a checklist."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from helena_cli.cli import render
from helena_cli.cli.options import Common, with_common_options
from helena_cli.errors import ExitCode, HelenaError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from helena_cli.batch.ledger import Queue
    from helena_cli.cli.checks import Check, Observed
    from helena_cli.cli.observer import Observer
    from helena_cli.runtime import Runtime


@with_common_options
def command(
    common: Common,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="For cron: be silent, but complain and exit with 1 if a check is critical.",
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.5, help="Seconds between two looks of --watch.")
    ] = 2.0,
) -> ExitCode:
    """Show the queue, the flushes, the database and a checklist.

    Answers within seconds, also when the database hangs. Exits with 0 whenever it could answer, and
    with 4 when the database is away: then the queue is shown all the same.
    """
    from helena_cli.cli.observer import Observer
    from helena_cli.runtime import Runtime

    if check and watch:
        raise UsageError("--check and --watch contradict each other.", remedy="Give one of them.")
    # Programs come again and again; what --watch asks is asked once, however long that takes.
    sparing = check or (common.json and not watch)
    with Runtime(common.settings()) as runtime, Observer(runtime, sparing=sparing) as observer:
        if watch:
            _watch(lambda: _look(runtime, observer), interval, as_json=common.json)
            return ExitCode.DONE
        page = _look(runtime, observer)
    code = page.code(check=check)
    if common.json:
        render.print_json(page.document())
    elif not check or code is not ExitCode.DONE:
        for part in page.complaints() if check else page.parts():
            render.show(part)
    return code


class _Page(NamedTuple):
    """One look, ready to be shown."""

    label: str
    spool: "Path"
    seen: "Observed"
    others: "Sequence[tuple[Path, Queue | None]]"
    checks: "Sequence[Check]"

    def document(self) -> dict[str, Any]:
        from helena_cli.cli.status_document import document

        return document(self.label, self.seen, self.others, self.checks)

    def code(self, *, check: bool) -> ExitCode:
        if self.seen.away is not None:
            return ExitCode.UNREACHABLE
        critical = any(one.status == "critical" for one in self.checks)
        return ExitCode.PARTIAL if check and critical else ExitCode.DONE

    def complaints(self) -> "Iterable[RenderableType]":
        from helena_cli.cli.status_view import complaints

        return complaints(self.label, self.seen, self.checks)

    def parts(self) -> "Iterable[RenderableType]":
        from helena_cli.cli.status_view import page

        return page(self.label, self.spool, self.seen, self.others, self.checks)

    def screen(self) -> "Iterable[RenderableType]":
        from helena_cli.cli.status_view import screen

        return screen(self.label, self.spool, self.seen, self.others, self.checks)


def _look(runtime: "Runtime", observer: "Observer") -> _Page:
    from helena_cli.cli.checks import judge

    seen = observer.look()
    return _Page(
        runtime.target.label,
        runtime.spool.path,
        seen,
        _other_spools(runtime.other_spools()),
        judge(seen, runtime.settings.checks),
    )


def _other_spools(paths: "Iterable[Path]") -> "list[tuple[Path, Queue | None]]":
    """What waits for other databases; None for a spool that cannot be read."""
    from helena_cli.batch.spool import Spool

    found: list[tuple[Path, Queue | None]] = []
    for path in paths:
        try:
            spool = Spool.open(path)
        except HelenaError:
            found.append((path, None))
            continue
        found.append((path, spool.queue()))
        spool.close()
    return found


def _watch(look: Callable[[], _Page], interval: float, *, as_json: bool) -> None:
    """Show one look after the other until Ctrl-C, which is the way to end this."""
    import json

    with suppress(KeyboardInterrupt):
        if sys.stdout.isatty() and not as_json and not render.console().is_dumb_terminal:
            _draw(look, interval)
        while True:
            page = look()
            if as_json:
                print(json.dumps(page.document()), flush=True)
            else:
                render.show(render.heading(_time(page)))
                for part in page.parts():
                    render.show(part)
                print(flush=True)
            time.sleep(interval)


def _draw(look: Callable[[], _Page], interval: float) -> None:
    """In place on a terminal. When it ends the whole last look stays there."""
    from rich.console import Group
    from rich.live import Live

    console = render.console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        # Whatever happens to this process, it does not leave a terminal without a cursor.
        console.show_cursor(True)
        size = console.size
        while True:
            page = look()
            if console.size != size:
                # The terminal has folded the old lines anew, and it is unknown where they begin.
                console.clear()
                size = console.size
            title = f"{_time(page)}, every {render.duration(interval)}; Ctrl-C ends"
            live.update(Group(render.heading(title), *page.screen()), refresh=True)
            time.sleep(interval)


def _time(page: _Page) -> str:
    return render.local_time(page.seen.now)
