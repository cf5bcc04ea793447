"""What one flush writes into one table, and in which order. Decisions only: no input, no output.

The operations on one key form a chain. Inserts and updates that follow each other merge, column by
column, and the last value wins; a message is never merged. The n-th element of every chain is in
wave n, and a lower wave goes first, so operations on one key never overtake each other. Rows of one
wave that give the same columns are one group, and one statement.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from enum import Enum
from operator import attrgetter
from typing import Final

import msgspec
from msgspec import Raw, Struct

from helena_cli.batch.flush import Verdict
from helena_cli.batch.operation import Operation
from helena_cli.batch.table import Special, Table, key_value

UPDATE_WITHOUT_KEY: Final = "HL001"
WAITS_FOR_EARLIER: Final = "HL002"
UNDEFINED_COLUMN: Final = "42703"

#: The number of a key of the table, and a value of it.
Identity = tuple[int, Hashable]


class Mode(Enum):
    """How a row is written."""

    UPSERT = "change the row with this key, or insert it"
    MESSAGE = "insert it unless its key exists"
    INSERT = "insert it: it has no key"


class Step(Struct, gc=False):
    """One operation, read against the table."""

    operation: Operation
    values: Mapping[str, Raw]
    #: In the table's order.
    columns: tuple[str, ...]
    #: The number of the key it goes by; None without one.
    key: int | None
    #: Its value in that key, or BAD or UNDECIDED.
    value: Hashable


class Row(Struct, gc=False):
    """What one statement does to one key: the work of one step, or of several merged ones."""

    steps: list[Step]
    columns: tuple[str, ...]
    mode: Mode
    segment: int
    wave: int

    @property
    def value(self) -> Hashable:
        """The value of its key."""
        return self.steps[0].value

    @property
    def merged(self) -> bool:
        """Whether several operations went into it."""
        return len(self.steps) > 1


class Group(Struct):
    """Rows that one statement can write, by the ids of their first operations."""

    mode: Mode
    columns: tuple[str, ...]
    #: The number of the table's key that identifies its rows.
    key: int | None
    rows: list[Row]


class Plan(Struct):
    """The groups in the order in which they are to be written, and who waits for a held one."""

    groups: list[Group]
    held: list[Verdict]


class Reader:
    """Reads operations against one table; remembers what it found out about each set of columns."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._by_name = {column.name: column for column in table.columns}
        self._keys = [tuple(self._by_name[name] for name in key) for key in table.keys]
        self._own_references = {
            column
            for foreign in table.foreign_keys
            if foreign.parent == table.oid
            for column in foreign.columns
        }
        self._seen: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[int, ...]]] = {}

    def read(self, operations: Iterable[Operation]) -> tuple[list[Step], list[Verdict]]:
        """The steps, and a verdict for each due operation that can never be written."""
        steps, dead = [], []
        for operation in operations:
            step = self._step(operation)
            if isinstance(step, Step):
                steps.append(step)
            elif operation.due:
                dead.append(step)
        return steps, dead

    def _step(self, operation: Operation) -> Step | Verdict:
        values = operation.columns()
        given = tuple(values)
        seen = self._seen.get(given) or self._see(given)
        columns, candidates = seen
        if len(columns) < len(given):
            return self._unknown_column(operation, given)
        for key in candidates:
            value = key_value(self._keys[key], values)
            if value is not Special.NULL:
                return Step(operation, values, columns, key, value)
        if operation.kind == "update":
            return self._no_key(operation)
        return Step(operation, values, columns, None, None)

    def _see(self, given: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        names = set(given)
        columns = tuple(name for name in self._by_name if name in names)
        candidates = tuple(n for n, key in enumerate(self.table.keys) if names.issuperset(key))
        self._seen[given] = columns, candidates
        return columns, candidates

    def _unknown_column(self, operation: Operation, given: Sequence[str]) -> Verdict:
        unknown = next(name for name in given if name not in self._by_name)
        message = f'column "{unknown}" of relation "{self.table.name}" does not exist'
        return Verdict(operation.id, UNDEFINED_COLUMN, message)

    def _no_key(self, operation: Operation) -> Verdict:
        keys = " or ".join(f"({', '.join(key)})" for key in self.table.keys) or "none exists"
        message = (
            f'an update of "{self.table.name}" needs all columns of a unique key, not null: {keys}'
        )
        return Verdict(operation.id, UPDATE_WITHOUT_KEY, message)

    def identities(self, step: Step) -> set[Identity]:
        """Every key value by which this operation may be known to be about the same row."""
        found = set()
        if step.key is not None and not isinstance(step.value, Special):
            found.add((step.key, step.value))
        for key in self._see(tuple(step.values))[1]:
            value = key_value(self._keys[key], step.values)
            if key != step.key and not isinstance(value, Special):
                found.add((key, value))
        return found

    def refers_to_itself(self, columns: Iterable[str]) -> bool:
        """Whether rows with these columns may have their parents in the same table."""
        return not self._own_references.isdisjoint(columns)

    def union(self, steps: Iterable[Step]) -> tuple[str, ...]:
        """The columns of a merged row."""
        return self._see(tuple({name: None for step in steps for name in step.columns}))[0]

    def data(self, row: Row) -> bytes:
        """The row as one JSON object: the spool's own bytes unless it is merged."""
        first = row.steps[0]
        if not row.merged:
            return first.operation.data
        merged: dict[str, Raw] = {}
        for step in row.steps:
            merged.update(step.values)
        # An update leaves the key as it was first written, even if it is spelled otherwise now.
        for name in self.table.keys[first.key] if first.key is not None else ():
            merged[name] = first.values[name]
        return msgspec.json.encode(merged)


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
    chains: dict[Hashable, list[Row]] = {}
    segment, current = 1, None
    for step in steps:
        if not step.operation.due:
            blocked.add(step, step.operation.id)
        elif verdict := blocked.check(step):
            held.append(verdict)
        elif step.key is None:
            rows.append(Row([step], step.columns, Mode.INSERT, segment=1, wave=0))
        else:
            if step.key != current:
                # Two keys may mean one row: what goes by another key waits until this is written.
                segment += current is not None
                current, chains = step.key, {}
            if row := _enchain(step, chains, segment):
                rows.append(row)
    for row in rows:
        if row.merged:
            row.columns = reader.union(row.steps)
    return Plan(_group(reader, rows), held)


def _enchain(step: Step, chains: dict[Hashable, list[Row]], segment: int) -> Row | None:
    """The row that a step adds to the chain of its key; None when it merged into the last one."""
    mode = Mode.MESSAGE if step.operation.kind == "message" else Mode.UPSERT
    if step.value is Special.BAD:
        return Row([step], step.columns, mode, segment, 0)
    chain = chains.setdefault(step.value, [])
    if chain and mode is Mode.UPSERT and chain[-1].mode is Mode.UPSERT:
        chain[-1].steps.append(step)
        return None
    row = Row([step], step.columns, mode, segment, len(chain))
    chain.append(row)
    return row


def _group(reader: Reader, rows: Iterable[Row]) -> list[Group]:
    groups: dict[tuple[int, int, bool, Mode, tuple[str, ...]], Group] = {}
    references: dict[tuple[str, ...], bool] = {}
    for row in rows:
        columns = row.columns
        if columns not in references:
            references[columns] = reader.refers_to_itself(columns)
        place = (row.segment, row.wave, references[columns], row.mode, columns)
        group = groups.get(place)
        if group is None:
            groups[place] = group = Group(row.mode, columns, row.steps[0].key, [])
        group.rows.append(row)
    # Within a wave, rows that may refer to rows of the same table go last; else by first id.
    return [groups[place] for place in sorted(groups, key=lambda place: place[:3])]


def by_key(rows: Sequence[Row]) -> list[Row]:
    """Rows of one group in the order in which all flushes lock them; keyless rows as they came."""
    if rows[0].mode is Mode.INSERT:
        return list(rows)
    good = [row for row in rows if row.value is not Special.BAD]
    good.sort(key=attrgetter("value"))
    return good + [row for row in rows if row.value is Special.BAD]


def unmerge(rows: Sequence[Row]) -> list[list[Row]]:
    """The originals of merged rows, one row each: in order for every key, else together."""
    groups: dict[tuple[int, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        for turn, step in enumerate(row.steps):
            single = Row([step], step.columns, row.mode, row.segment, row.wave)
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
