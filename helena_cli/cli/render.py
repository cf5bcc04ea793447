"""How results look: JSON, tables, numbers, questions and progress.

Text from outside (SQL, file names, messages of the server) goes through `plain` or `cell`: it is
shown as it is, never read as markup, and cannot move the cursor. Nothing in a table is cut off.
"""

import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

from helena_cli.errors import Refused

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

#: A pipe has no width; Rich would take 80 columns and fold what a program wants to read.
PIPE_WIDTH = 10_000

STYLES = {"ok": "green", "warn": "yellow", "critical": "bold red", "unknown": "dim"}


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout."""
    import json

    print(json.dumps(document, indent=2))


def say(text: str) -> None:
    """A line for the person, on stderr."""
    print(visible(text), file=sys.stderr)


def instant(seconds: float | None) -> str | None:
    """A Unix time as ISO 8601 in UTC, for JSON."""
    from helena_cli.batch import report

    return report.instant(seconds)


def local_time(seconds: float | None) -> str:
    """A Unix time as the clock on the wall shows it."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def plain(value: object) -> str:
    """Text on one line, without characters that move the cursor or turn the direction."""
    text = "" if value is None else str(value)
    return _MOVES_CURSOR.sub("", _BREAKS_LINE.sub(" ", text))


def visible(text: str) -> str:
    """The text with its lines and tabs, and nothing else that moves the cursor."""
    return _MOVES_CURSOR.sub(lambda match: match[0] if match[0] in "\n\t" else "", text)


_BREAKS_LINE = re.compile(r"\s*[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")
_MOVES_CURSOR = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def milliseconds(value: float | None) -> str:
    """Milliseconds with as many digits as they deserve, or a dash."""
    return "-" if value is None else f"{number(value, 1 if value < 100 else 0)} ms"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.3 s, 42 s, 3 min, 2 h 5 min, 4 d 3 h."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def size(count: int) -> str:
    """Bytes as a person says them."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"


def many(count: int, noun: str, plural: str | None = None) -> str:
    """`1 operation`, `2,000 operations`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def cell(value: object, style: str = "") -> "Text":
    """A table cell that shows its text as it is."""
    from rich.text import Text

    return Text(plain(value), style=style, overflow="fold")


def console(*, stderr: bool = False) -> "Console":
    """A console on the terminal; on a pipe one that is wide enough for anything."""
    stream = sys.stderr if stderr else sys.stdout
    return _console(stream, None if _is_terminal(stream) else PIPE_WIDTH)


def _console(stream: IO[str], width: int | None) -> "Console":
    from rich.console import Console

    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def _is_terminal(stream: IO[str] | None) -> bool:
    # A stream is None when the shell has closed it.
    return stream is not None and stream.isatty()


def show(shown: "RenderableType") -> None:
    """Print it on stdout."""
    if _is_terminal(sys.stdout):
        console().print(shown)
        return
    # Rich fills each line up to the width of its table.
    text = io.StringIO()
    _console(text, PIPE_WIDTH).print(shown)
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()
) -> "Table":
    """A table; `right` names the columns of numbers. A cell is text or made by `cell`."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    numbers = set(right)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(item if isinstance(item, Text) else cell(item) for item in row))
    return made


def facts(pairs: Iterable[tuple[str, object]]) -> "Table":
    """Names and values below each other."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, value if isinstance(value, Text) else cell(value))
    return made


def heading(text: str) -> "Text":
    """A heading, with a line of room above."""
    from rich.text import Text

    return Text(f"\n{text}", style="bold")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()
) -> None:
    """A `table` on stdout."""
    show(table(columns, rows, right=right))


def print_facts(pairs: Iterable[tuple[str, object]]) -> None:
    """`facts` on stdout."""
    show(facts(pairs))


def print_heading(text: str) -> None:
    """A `heading` on stdout."""
    show(heading(text))


def confirm(question: str, *, yes: bool) -> None:
    """Ask on the terminal. Raises Refused for a no, and when there is nobody to ask."""
    if yes:
        return
    if not _is_terminal(sys.stdin):
        raise Refused(
            f"{question} There is no terminal to ask on; nothing was changed.",
            remedy="Look at the plan, then run the same command with --yes.",
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Refused(
            "Nothing was changed.", remedy="Answer y, or give --yes, when it should be done."
        )


Progress = Callable[[int, int | None, str], None]


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar on stderr while the block runs, if that is a terminal.

    It is called with what is done, the total if that is known, and where the work is.
    """
    if not _is_terminal(sys.stderr):
        yield lambda done, total, where: None
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    with Bar(*columns, TimeElapsedColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, count="")

        def step(done: int, total: int | None, where: str) -> None:
            count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            bar.update(task, completed=done, total=total, count=count)

        yield step
