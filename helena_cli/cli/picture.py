"""What `helena watch` shows on a terminal: lines that fit into it. Pure.

What a person must act on is never cut off: it folds, and it pushes out charts and lists first.
What merely tells what happened stays on one line each.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from helena_cli.batch.ledger import Queue
from helena_cli.cli import charts, render
from helena_cli.cli.charts import BARS, LABEL
from helena_cli.cli.seen import WARN, Row, Seen, clock, urgent, with_reason

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: On a terminal of fewer columns than this the rows of a flush are left out.
ROWS_WIDTH = 66

#: The folders need not fill the screen.
MOST_FOLDER_LINES = 4


def compose(seen: Seen, console: "Console", *, bars: str = BARS) -> "list[Text]":
    """The picture, in fewer lines than the console has and within its width."""
    width, height = console.size
    title, room = _title(seen, width), height - 2
    facts = _folded(_facts(seen), console)
    must = _folded(urgent(seen), console)
    if len(facts) + len(must) > room:
        shown = max(0, room - len(facts) - 1)
        hint = f"... {len(must) - shown} more lines of this; helena status shows all"
        more = _folded([Row("", hint, "bold")], console)
        return [title, *facts, *must[:shown], *more][: height - 1]
    room -= len(facts) + len(must)
    drawn = charts.draw(seen.series, width, bars)
    if len(drawn) > room or not drawn:
        drawn = _folded([_kinds(seen.queue)], console)[:room]
    lists = _lists(seen, console, room - len(drawn))
    return [title, *drawn, *facts, *must, *lists]


def _title(seen: Seen, width: int) -> "Text":
    from rich.text import Text

    title = Text(f"Helena writes to {render.plain(seen.target)}", "bold", no_wrap=True)
    keys = "Ctrl-C writes the rest and stops"
    gap = width - title.cell_len - len(keys)
    if gap >= 2:
        title.append(f"{' ' * gap}{keys}", "not bold dim")
    title.truncate(width)
    return title


def _facts(seen: Seen) -> Iterator[Row]:
    """What is always shown, in a few words each."""
    queue, dead = seen.queue, seen.queue.dead_letters
    age = queue.oldest_seconds
    oldest = "nothing waits" if age is None else f"the oldest {render.duration(age)} old"
    yield Row("Queue", f"{render.many(queue.total, 'operation')}, {oldest}")
    yield Row("Flusher", _flusher(seen))
    if dead:
        text = f"{dead:,}; helena dead-letters list says why; then retry or drop them"
        yield Row("Dead letters", text, WARN)
    else:
        yield Row("Dead letters", "none")


def _kinds(queue: Queue) -> Row:
    text = f"{queue.insert:,} insert, {queue.update:,} update, {queue.message:,} message"
    return Row("Waiting", text)


def _flusher(seen: Seen) -> str:
    if not seen.flusher_running:
        return "none is running"
    if seen.flusher_here:
        return "this process"
    return f"process {seen.flusher}" if seen.flusher else "another process"


# What happened


def _lists(seen: Seen, console: "Console", room: int) -> "list[Text]":
    """Flushes, documents, folders and checks, in as many lines as there is room for."""
    checks = _folded(_checks(seen), console)
    folders = _folded(_folders(seen), console)
    if len(folders) > (most := min(room, MOST_FOLDER_LINES)):
        more = Row("", f"... {len(folders) - most + 1} more lines")
        folders = [*folders[: most - 1], _cropped(more, console.width)][:most]
    checks = checks if len(checks) + len(folders) <= room else []
    room -= len(checks) + len(folders)
    documents = [_cropped(row, console.width) for row in _documents(seen)]
    flushes = [_cropped(row, console.width) for row in _flushes(seen, console.width)]
    # Each gets half, and what the other does not need.
    flushes = flushes[: max(0, room - len(documents), (room + 1) // 2)]
    documents = documents[: max(0, room - len(flushes))]
    return [*flushes, *documents, *folders, *checks]


def _flushes(seen: Seen, width: int) -> Iterator[Row]:
    label = "Last flushes"
    for flush in seen.flushes:
        if flush.error is None:
            operations = f"{render.many(flush.operations, 'operation'):>16}"
            rows = f"  {render.many(flush.rows, 'row'):>12}" if width >= ROWS_WIDTH else ""
            took = f"{render.milliseconds(flush.seconds * 1000):>10}"
            yield Row(label, f"{clock(flush.at)}  {operations}{rows}  {took}")
            label = ""


def _documents(seen: Seen) -> Iterator[Row]:
    label = "Documents"
    for change in seen.watch.changes:
        if change.change != "failed":
            yield Row(label, f"{clock(change.at)}  {change.change:9}", path=change.path)
            label = ""


def _folders(seen: Seen) -> Iterator[Row]:
    watch = seen.watch
    if not watch.roots:
        return
    settling = f", {render.many(watch.settling, 'path')} settling" if watch.settling else ""
    looked = f"all looked at {clock(watch.last_full)}" if watch.last_full else "not looked at yet"
    yield Row("Folders", f"{render.many(len(watch.roots), 'folder')}, {looked}{settling}")
    for root in watch.roots:
        if root.mode != "away":
            yield Row("", f"{root.mode:8} {with_reason(root.path, root.reason)}")


def _checks(seen: Seen) -> Iterator[Row]:
    names: dict[str, list[str]] = {status: [] for status in render.STYLES}
    for check in seen.checks:
        names.setdefault(check.status, []).append(check.name)
    unknown = f" ({', '.join(names['unknown'])})" if names["unknown"] else ""
    parts = [f"{len(found)} {status}" for status, found in names.items() if found]
    if parts:
        yield Row("Checks", f"{', '.join(parts)}{unknown}")
    if seen.unchecked is not None:
        yield Row("Checks" if not parts else "", f"could not be made: {seen.unchecked}")


# Lines


def _folded(rows: Iterable[Row], console: "Console") -> "list[Text]":
    """Every row in as many lines as it needs."""
    from rich.text import Text

    lines = []
    for row in rows:
        label = row.label
        text = Text(render.plain(row.text), overflow="fold")
        for part in text.wrap(console, max(10, console.width - LABEL)):
            lines.append(Text(f"{label:{LABEL}}{part.plain.rstrip()}", row.style, no_wrap=True))
            label = ""
    return lines


def _cropped(row: Row, width: int) -> "Text":
    """A row on one line; of its path the end."""
    from rich.cells import cell_len
    from rich.text import Text

    start, path = f"{row.label:{LABEL}}{row.text}", render.plain(row.path)
    room = max(0, width - cell_len(start))
    if cell_len(path) > room:
        while path and cell_len(path) > room - 3:
            path = path[1:]
        path = f"...{path}"
    line = Text(f"{start}{path}", row.style, no_wrap=True)
    line.truncate(width)
    return line
