"""What one flush writes into one table, and in which order. Decisions only: no input, no output.

The operations on one key form a chain. Inserts and updates that follow each other merge, column by
column, and the last value wins; a message is never merged. The n-th element of every chain is in
wave n, and a lower wave goes first, so operations on one key never overtake each other. Rows of one
wave that give the same columns are one group, and one statement.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from enum import Enum
from operator import attrgetter

import msgspec
from msgspec import Struct

from helena_cli.batch.reading import Columns, Identity, Reader, Step
from helena_cli.batch.table import Special
from helena_cli.batch.verdict import Verdict

WAITS_FOR_EARLIER = "HL002"


class Mode(Enum):
    """How a row is written."""

    UPSERT = "change the row with this key, or insert it"
    MESSAGE = "insert it unless its key exists"
    INSERT = "insert it: it has no key"


class Row(Struct, gc=False):
    """What one statement does to one key: the work of one step, or of several merged ones."""

    first: Step
    columns: Columns
    mode: Mode
    value: Hashable
    segment: int = 1
    wave: int = 0
    #: The steps that were merged into it, in order.
    merged: list[Step] | tuple[()] = ()

    @property
    def steps(self) -> list[Step]:
        """All of its steps, in order."""
        return [self.first, *self.merged]


class Group(Struct):
    """Rows that one statement can write, by the ids of their first operations."""

    mode: Mode
    columns: Columns
    #: The number of the table's key that identifies its rows.
    key: int | None
    rows: list[Row]


class Plan(Struct):
    """The groups in the order in which they are to be written, and who waits for a held one."""

    groups: list[Group]
    held: list[Verdict]


class Blocked:
    """The keys that a held operation blocks, and by which operation."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._by: dict[Identity, int] = {}

    def __bool__(self) -> bool:
        return bool(self._by)

    def add(self, step: Step, operation_id: int) -> None:
        """From now on later operations on the keys of this step wait for the operation."""
        for identity in self._reader.identities(step):
            self._by.setdefault(identity, operation_id)

    def check(self, step: Step) -> Verdict | None:
        """Why a step must wait, if it must; it then blocks its own keys too."""
        if not self._by:
            return None
        found = self._reader.identities(step) & self._by.keys()
        if not found:
            return None
        blocker = min(self._by[identity] for identity in found)
        self.add(step, blocker)
        message = f"waits for operation {blocker} on the same key, which was put back"
        return Verdict(step.operation.id, WAITS_FOR_EARLIER, message)


def arrange(reader: Reader, steps: Sequence[Step], blocked: Blocked) -> Plan:
    """Merge, order and group the steps, which come by id; values are decided by now.

    A step that is not due writes nothing and blocks its key for the later ones.
    """
    held: list[Verdict] = []
    rows: list[Row] = []
    last: dict[Hashable, Row] = {}
    segment, current = 1, None
    for step in steps:
        if not step.operation.due:
            blocked.add(step, step.operation.id)
        elif verdict := blocked.check(step):
            held.append(verdict)
        elif step.key is None:
            rows.append(Row(step, step.columns, Mode.INSERT, None))
        else:
            if step.key != current:
                # Two keys may mean one row: what goes by another key waits until this is written.
                segment += current is not None
                current, last = step.key, {}
            if row := _enchain(step, last, segment):
                rows.append(row)
    for row in rows:
        if row.merged:
            row.columns = _union(reader, row.steps)
    return Plan(_group(rows), held)


def _enchain(step: Step, last: dict[Hashable, Row], segment: int) -> Row | None:
    """The row that a step adds to the chain of its key; None when it merged into the last one."""
    mode = Mode.MESSAGE if step.operation.kind == "message" else Mode.UPSERT
    value = step.value
    if value is Special.BAD:
        return Row(step, step.columns, mode, value, segment)
    before = last.get(value)
    if before is None:
        wave = 0
    elif before.mode is mode is Mode.UPSERT:
        if before.merged:
            before.merged.append(step)
        else:
            before.merged = [step]
        return None
    else:
        wave = before.wave + 1
    last[value] = row = Row(step, step.columns, mode, value, segment, wave)
    return row


def _group(rows: Iterable[Row]) -> list[Group]:
    groups: dict[tuple[int, int, Mode, Columns], Group] = {}
    for row in rows:
        place = (row.segment, row.wave, row.mode, row.columns)
        group = groups.get(place)
        if group is None:
            groups[place] = Group(row.mode, row.columns, row.first.key, [row])
        else:
            group.rows.append(row)

    def order(place: tuple[int, int, Mode, Columns]) -> tuple[int, int, bool]:
        # Within a wave, rows that may refer to rows of the same table go last; else by first id.
        return (place[0], place[1], place[3].refers_to_itself)

    return [groups[place] for place in sorted(groups, key=order)]


def _union(reader: Reader, steps: Iterable[Step]) -> Columns:
    sets = {step.columns for step in steps}
    return reader.columns(name for columns in sets for name in columns.names)


def part(reader: Reader, row: Row, steps: Sequence[Step]) -> Row:
    """A row of some of the steps of a merged one."""
    first, *merged = steps
    columns = _union(reader, steps)
    return Row(first, columns, row.mode, row.value, row.segment, row.wave, merged)


def data(reader: Reader, row: Row) -> bytes:
    """The row as one JSON object: the spool's own bytes unless it is merged."""
    return msgspec.json.encode(values(reader, row)) if row.merged else row.first.operation.data


def values(reader: Reader, row: Row) -> dict[str, msgspec.Raw]:
    """The row's values by column, each still encoded."""
    first = row.first.operation.columns()
    if not row.merged:
        return first
    values: dict[str, msgspec.Raw] = {}
    # The last value wins, so the earlier ones need not be read once each column has its own.
    for step in reversed(row.merged):
        values = step.operation.columns() | values
        if len(values) == len(row.columns.names):
            break
    key = reader.table.keys[row.first.key] if row.first.key is not None else ()
    # An update leaves the key as it was first written, even if it is spelled otherwise now.
    return first | values | {name: first[name] for name in key}


def by_key(rows: Sequence[Row]) -> list[Row]:
    """Rows of one group in the order in which all flushes lock them; keyless rows as they came."""
    if rows[0].mode is Mode.INSERT:
        return list(rows)
    bad = Special.BAD
    good = [row for row in rows if row.value is not bad]
    good.sort(key=attrgetter("value"))
    return good + [row for row in rows if row.value is bad] if len(good) < len(rows) else good


def unmerge(rows: Sequence[Row]) -> list[list[Row]]:
    """The originals of merged rows, one row each: in order for every key, else together."""
    groups: dict[tuple[int, Columns], list[Row]] = {}
    for row in rows:
        for turn, step in enumerate(row.steps):
            single = Row(step, step.columns, row.mode, row.value, row.segment, row.wave)
            groups.setdefault((turn, step.columns), []).append(single)
    return [groups[place] for place in sorted(groups, key=lambda place: place[0])]


def flush_due(count: int, oldest_age: float | None, *, size: int, interval: float) -> bool:
    """Whether to flush: enough operations, or one that has waited long enough. Ages in seconds.

    A negative age means that the clock was set back; nobody knows how long it waited then.
    """
    if count <= 0:
        return False
    return count >= size or (oldest_age is not None and not 0 <= oldest_age < interval)


def backoff(
    attempt: int, *, base: float = 0.2, cap: float = 60.0, random: Callable[[], float]
) -> float:
    """Seconds before the next attempt, after `attempt` earlier retries (from 0).

    It doubles up to `cap`; `random`, from 0 to 1, takes off up to half, so that many flushers do
    not come back at one moment.
    """
    delay = min(cap, base * 2.0 ** min(max(attempt, 0), 64))
    return delay * (1.0 - random() / 2.0)
