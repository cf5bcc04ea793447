"""Operations read against their table: which columns they give, and by which key they go."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct

from helena_cli.batch.operation import Operation
from helena_cli.batch.table import Special, Table, key_value
from helena_cli.batch.verdict import Verdict

UPDATE_WITHOUT_KEY = "HL001"
UNREADABLE = "HL005"
UNDEFINED_COLUMN = "42703"

#: Operations whose lines are made together, their values being kept until then.
BLOCK = 250

#: Sets of columns, in different orders, that a reader remembers.
MOST_SETS = 1000

#: The number of a key of the table, and a value of it.
Identity = tuple[int, Hashable]

#: Column → value, still encoded.
Values = Mapping[str, msgspec.Raw]


class Columns:
    """A set of columns, one object for each set; `names` are in the table's order."""

    __slots__ = ("candidates", "lines", "names", "refers_to_itself", "unknown")

    def __init__(self, table: Table, given: frozenset[str]) -> None:
        known = [column.name for column in table.columns]
        self.names = tuple(name for name in known if name in given)
        #: Makes of rows the lines that load them in bulk; set by whoever can load such rows.
        self.lines: Callable[[Sequence[Values]], Sequence[bytes | None]] | None = None
        self.unknown = given.difference(known)
        #: The numbers of the keys that are given completely.
        self.candidates = tuple(n for n, key in enumerate(table.keys) if given.issuperset(key))
        #: Whether rows with these columns may have their parents in the same table.
        self.refers_to_itself = any(
            foreign.parent == table.oid and not given.isdisjoint(foreign.columns)
            for foreign in table.foreign_keys
        )


class Step(Struct, gc=False):
    """One operation, read against the table.

    Its values are not kept, for memory is the cost here; at most their line.
    """

    operation: Operation
    columns: Columns
    #: The number of the key it goes by; None without one.
    key: int | None
    #: Its value in that key, or BAD or UNDECIDED.
    value: Hashable
    #: What `Columns.lines` made of it.
    line: bytes | None = None


NOTHING: Mapping[int, Step | Verdict] = {}


class Reading(Struct, frozen=True):
    """Operations that were read beforehand: id → step, or why there is none."""

    reader: "Reader"
    steps: Mapping[int, Step | Verdict]


class Reader:
    """Reads operations against one table; remembers what it found out about each set of columns."""

    def __init__(self, table: Table) -> None:
        self.table = table
        by_name = {column.name: column for column in table.columns}
        self._keys = [tuple(by_name[name] for name in key) for key in table.keys]
        self._by_order: dict[tuple[str, ...], Columns] = {}
        self._by_set: dict[frozenset[str], Columns] = {}

    @property
    def is_full(self) -> bool:
        """Whether it remembers so many sets of columns that a new one should take over."""
        return len(self._by_order) > MOST_SETS

    def read_ahead(self, operations: Iterable[Operation]) -> Reading:
        """Read operations for a later `read` by this reader."""
        return Reading(self, self._steps(list(operations)))

    def read(
        self, operations: Sequence[Operation], ahead: Mapping[int, Step | Verdict] = NOTHING
    ) -> tuple[list[Step], list[Verdict]]:
        """The steps, and a verdict for each due operation that can never be written.

        `ahead` is what `read_ahead` of this reader made of some of them.
        """
        read = self._steps([o for o in operations if not _is_read(o, ahead.get(o.id))])
        steps, dead = [], []
        for operation in operations:
            step = read.get(operation.id) or ahead[operation.id]
            if isinstance(step, Step):
                steps.append(step)
            elif operation.due:
                dead.append(step)
        return steps, dead

    def _steps(self, operations: Sequence[Operation]) -> dict[int, Step | Verdict]:
        """Id → step, or why there is none."""
        found: dict[int, Step | Verdict] = {}
        for start in range(0, len(operations), BLOCK):
            loads: dict[Columns, tuple[list[Step], list[Values]]] = {}
            for operation in operations[start : start + BLOCK]:
                try:
                    values = operation.columns()
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    # Damage: it was an object when it was accepted. It must not hold up the others.
                    found[operation.id] = _unreadable(operation, error)
                    continue
                found[operation.id] = step = self._step(operation, values)
                if isinstance(step, Step) and step.columns.lines is not None:
                    steps, rows = loads.setdefault(step.columns, ([], []))
                    steps.append(step)
                    rows.append(values)
            for columns, (steps, rows) in loads.items():
                _add_lines(columns, steps, rows)
        return found

    def _step(self, operation: Operation, values: Values) -> Step | Verdict:
        given = tuple(values)
        columns = self._by_order.get(given)
        if columns is None:
            self._by_order[given] = columns = self.columns(given)
        if columns.unknown:
            return self._unknown_column(operation, columns)
        for key in columns.candidates:
            value = key_value(self._keys[key], values)
            if value is not Special.NULL:
                return Step(operation, columns, key, value)
        if operation.kind == "update":
            return self._no_key(operation)
        return Step(operation, columns, None, None)

    def columns(self, names: Iterable[str]) -> Columns:
        """The one object for this set of columns."""
        given = frozenset(names)
        found = self._by_set.get(given)
        # Two threads may come here: the first one's object is everybody's.
        return found or self._by_set.setdefault(given, Columns(self.table, given))

    def _unknown_column(self, operation: Operation, columns: Columns) -> Verdict:
        message = f'column "{min(columns.unknown)}" of relation "{self.table.name}" does not exist'
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
        values = step.operation.columns()
        for key in step.columns.candidates:
            value = key_value(self._keys[key], values)
            if key != step.key and not isinstance(value, Special):
                found.add((key, value))
        return found


def _is_read(operation: Operation, step: Step | Verdict | None) -> bool:
    """Whether this is what came of the operation as it is now: it may have been put back since."""
    return step.operation is operation if isinstance(step, Step) else step is not None


def _unreadable(operation: Operation, error: Exception) -> Verdict:
    return Verdict(operation.id, UNREADABLE, f"its data are not a JSON object: {error}")


def _add_lines(columns: Columns, steps: Sequence[Step], rows: Sequence[Values]) -> None:
    # Taken once: another thread may set it.
    make = columns.lines
    if make is not None:
        for step, line in zip(steps, make(rows), strict=True):
            step.line = line
