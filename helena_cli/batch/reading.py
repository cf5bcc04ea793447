"""Operations read against their table: which columns they give, and by which key they go."""

from collections.abc import Callable, Hashable, Iterable, Mapping

import msgspec
from msgspec import Struct

from helena_cli.batch.operation import Operation
from helena_cli.batch.table import Special, Table, key_value
from helena_cli.batch.verdict import Verdict

UPDATE_WITHOUT_KEY = "HL001"
UNREADABLE = "HL005"
UNDEFINED_COLUMN = "42703"

#: Sets of columns, in different orders, that a reader remembers.
MOST_SETS = 1000

#: The number of a key of the table, and a value of it.
Identity = tuple[int, Hashable]


class Columns:
    """A set of columns, one object for each set; `names` are in the table's order."""

    __slots__ = ("candidates", "line", "names", "refers_to_itself", "unknown")

    def __init__(self, table: Table, given: frozenset[str]) -> None:
        known = [column.name for column in table.columns]
        self.names = tuple(name for name in known if name in given)
        #: Makes of a row the line that loads it in bulk; set by whoever can load such rows.
        self.line: Callable[[Mapping[str, msgspec.Raw]], bytes | None] | None = None
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
    #: What `Columns.line` made of it.
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
        return Reading(self, {operation.id: self._step(operation) for operation in operations})

    def read(
        self, operations: Iterable[Operation], ahead: Mapping[int, Step | Verdict] = NOTHING
    ) -> tuple[list[Step], list[Verdict]]:
        """The steps, and a verdict for each due operation that can never be written.

        `ahead` is what `read_ahead` of this reader made of some of them.
        """
        steps, dead = [], []
        for operation in operations:
            step = ahead.get(operation.id) or self._step(operation)
            if isinstance(step, Step):
                steps.append(step)
            elif operation.due:
                dead.append(step)
        return steps, dead

    def _step(self, operation: Operation) -> Step | Verdict:
        try:
            values = operation.columns()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # Damage: it was an object when it was accepted. It must not hold up the others.
            return Verdict(operation.id, UNREADABLE, f"its data are not a JSON object: {error}")
        given = tuple(values)
        columns = self._by_order.get(given)
        if columns is None:
            self._by_order[given] = columns = self.columns(given)
        if columns.unknown:
            return self._unknown_column(operation, columns)
        for key in columns.candidates:
            value = key_value(self._keys[key], values)
            if value is not Special.NULL:
                return Step(operation, columns, key, value, _line(columns, values))
        if operation.kind == "update":
            return self._no_key(operation)
        return Step(operation, columns, None, None, _line(columns, values))

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


def _line(columns: Columns, values: Mapping[str, msgspec.Raw]) -> bytes | None:
    # Taken once: another thread may set it.
    line = columns.line
    return None if line is None else line(values)
