"""The charts of the live view: the last minutes in columns, a character each. Pure."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from helena_cli.batch.ledger import FlushRecord, Queue
from helena_cli.cli import render

if TYPE_CHECKING:
    from rich.text import Text

#: How much time a column stands for. With the usual interval of five seconds it holds two flushes;
#: a shorter one would show a comb.
COLUMN_SECONDS = 10

#: How many columns are kept: twenty minutes, more than most terminals are wide.
KEPT_COLUMNS = 120

#: With fewer columns than this a chart shows nothing.
FEWEST_COLUMNS = 10

#: From nothing to the most; and the same for a terminal without Unicode.
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.:-=+*#"

#: Columns of the names on the left, and of each number on the right.
LABEL = 14
NUMBER = 10


class Series(Struct, frozen=True):
    """One chart: its value now, and those of the columns, the oldest first; None is unknown."""

    name: str
    values: tuple[float | None, ...]
    now: float | None
    #: The unit of its numbers: pieces or milliseconds.
    milliseconds: bool = False


_EMPTY = Queue(0, 0, 0, 0, None, 0, 0)


class _Column(Struct):
    """What happened in one column: the most that waited, what was written, the slowest flush."""

    insert: int | None = None
    update: int | None = None
    message: int | None = None
    operations: int = 0
    flush_ms: float | None = None


class History:
    """Collects looks at the queue, and flushes."""

    def __init__(self) -> None:
        self._columns: dict[int, _Column] = {}
        self._recent: deque[FlushRecord] = deque(maxlen=1000)
        self._queue: Queue | None = None

    def add(self, queue: Queue, flushes: Iterable[FlushRecord], now: float) -> None:
        """Note what waits at this Unix time, and the flushes since the last look."""
        self._queue = queue
        column = self._column(now)
        column.insert = max(column.insert or 0, queue.insert)
        column.update = max(column.update or 0, queue.update)
        column.message = max(column.message or 0, queue.message)
        for flush in flushes:
            if flush.error is None:
                self._recent.append(flush)
                column = self._column(flush.at)
                column.operations += flush.operations
                column.flush_ms = max(column.flush_ms or 0.0, flush.seconds * 1000)
        oldest = _number(now) - KEPT_COLUMNS
        self._columns = {n: column for n, column in self._columns.items() if n > oldest}

    def series(self, now: float) -> tuple[Series, ...]:
        """All charts, up to this Unix time."""
        last = _number(now)
        first = min(self._columns, default=last)
        columns = [self._columns.get(number, _Column()) for number in range(first, last + 1)]
        queue = self._queue or _EMPTY
        written = sum(flush.operations for flush in self._recent if flush.at > now - COLUMN_SECONDS)
        took = self._recent[-1].seconds * 1000 if self._recent else None
        return (
            Series("insert", tuple(c.insert for c in columns), queue.insert),
            Series("update", tuple(c.update for c in columns), queue.update),
            Series("message", tuple(c.message for c in columns), queue.message),
            Series(
                "operations/s",
                tuple(c.operations / COLUMN_SECONDS for c in columns),
                written / COLUMN_SECONDS,
            ),
            Series("flush time", tuple(c.flush_ms for c in columns), took, milliseconds=True),
        )

    def _column(self, at: float) -> _Column:
        return self._columns.setdefault(_number(at), _Column())


def _number(at: float) -> int:
    return int(at // COLUMN_SECONDS)


def draw(series: Sequence[Series], width: int, bars: str = BARS) -> "list[Text]":
    """A heading and a line for each chart; nothing where there is no room for any."""
    from rich.text import Text

    columns = min(width - LABEL - 2 * NUMBER, KEPT_COLUMNS)
    if columns < FEWEST_COLUMNS or not series:
        return []
    reach = f"the last {render.duration(columns * COLUMN_SECONDS)}"[:columns]
    heading = f"{'Waiting':{LABEL}}{reach:>{columns}}{'now':>{NUMBER}}{'most':>{NUMBER}}"
    lines = [Text(heading, "dim", no_wrap=True)]
    for one in series:
        values = one.values[-columns:]
        show = render.milliseconds if one.milliseconds else _number_shown
        line = Text(f"{one.name:{LABEL}}", no_wrap=True)
        line.append(sparkline(values, bars).rjust(columns), "cyan")
        # Now lies across two columns.
        largest = most((*values, one.now))
        lines.append(line.append(f"{show(one.now):>{NUMBER}}{show(largest):>{NUMBER}}"))
    return lines


def _number_shown(value: float | None) -> str:
    """A rate below one is not nothing."""
    whole = value is None or value >= 10 or value == int(value)
    return render.number(value, 0 if whole else 1)


def sparkline(values: Sequence[float | None], bars: str = BARS) -> str:
    """A character for each value, by its share of the largest one; a blank for what is unknown."""
    largest = most(values) or 0.0

    def bar(value: float) -> str:
        # Little is more than nothing.
        return bars[max(1, round(value / largest * (len(bars) - 1)))] if value > 0 else bars[0]

    return "".join(" " if value is None else bar(value) for value in values)


def most(values: Iterable[float | None]) -> float | None:
    """The largest value that is known."""
    return max((value for value in values if value is not None), default=None)
