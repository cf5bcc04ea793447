"""What waits in the inbox, counted: for numbers it need not come into the tables."""

from collections import Counter

from msgspec import Struct, field

from helena_cli.batch.operation import Kind


class Tally(Struct):
    """Operations by kind and table, the oldest one's id, and bytes."""

    counts: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    first: int | None = None
    size: int = 0

    def add(self, identifier: int, kind: Kind, table: str) -> None:
        """Count one operation; they come by id."""
        self.counts[kind, table] += 1
        if self.first is None:
            self.first = identifier

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
            found[table] += count
        return found
