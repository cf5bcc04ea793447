"""What waits in the inbox, counted: for numbers it need not come into the tables."""

from collections import Counter

from msgspec import Struct, field

from helena_cli.batch.operation import Kind


class Tally(Struct):
    """Operations by kind and table, the oldest one's id, and bytes."""

    #: By the bytes of the table's name.
    counts: Counter[tuple[Kind, bytes]] = field(default_factory=Counter)
    first: int | None = None
    size: int = 0

    def add(self, identifier: int, kind: Kind, table: bytes) -> None:
        """Count one operation; they come by id."""
        self.counts[kind, table] += 1
        if self.first is None:
            self.first = identifier

    def is_sound(self) -> bool:
        """Whether all tables have names that can be; the records' checksums were not looked at."""
        try:
            self.tables()
        except UnicodeDecodeError:
            return False
        return True

    @property
    def total(self) -> int:
        """How many there are."""
        return self.counts.total()

    def kind(self, kind: Kind) -> int:
        """How many are of a kind."""
        return sum(count for (its, _), count in self.counts.items() if its == kind)

    def tables(self) -> Counter[str]:
        """How many each table has."""
        found: Counter[str] = Counter()
        for (_, table), count in self.counts.items():
            found[table.decode()] += count
        return found
