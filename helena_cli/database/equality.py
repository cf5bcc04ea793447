"""Asks the database which keys are equal, where Python cannot know."""

from collections.abc import Callable, Sequence

import msgspec
import psycopg

from helena_cli.batch.flush import FlushFailed
from helena_cli.batch.reading import Step
from helena_cli.batch.table import Column, Special, Table
from helena_cli.database import statement
from helena_cli.database.failure import Failure
from helena_cli.database.transaction import Transaction

Judge = Callable[[psycopg.Error], Failure]


def decide(transaction: Transaction, table: Table, steps: Sequence[Step], judge: Judge) -> set[int]:
    """Give each step whose key is undecided a value: equal numbers for equal keys, or BAD.

    All keys of one index get numbers then, or they could not be compared; returns the indexes.
    `judge` returns for an error that concerns single rows, and raises for any other.
    """
    by_name = {column.name: column for column in table.columns}
    undecided = {
        step.key for step in steps if step.key is not None and step.value is Special.UNDECIDED
    }
    for key in undecided:
        columns = [by_name[name] for name in table.keys[key]]
        some = [step for step in steps if step.key == key and step.value is not Special.BAD]
        ranking = _Ranking(transaction, columns, judge)
        ranking.mark_bad(some)
        good = [step for step in some if step.value is not Special.BAD]
        if len(good) < len(some) and not ranking.rank(good):
            raise FlushFailed("some keys can be read one by one, but not together", unknown=True)
    return undecided


class _Ranking:
    def __init__(self, transaction: Transaction, columns: Sequence[Column], judge: Judge) -> None:
        self._transaction = transaction
        self._names = [column.name for column in columns]
        self._query = transaction.compose(statement.rank(columns))
        self._judge = judge

    def mark_bad(self, steps: Sequence[Step]) -> None:
        """Rank these keys, or find those that are no values of their types by halving."""
        if not steps or self.rank(steps):
            return
        if len(steps) == 1:
            steps[0].value = Special.BAD
            return
        middle = len(steps) // 2
        self.mark_bad(steps[:middle])
        self.mark_bad(steps[middle:])

    def rank(self, steps: Sequence[Step]) -> bool:
        """Number equal keys equally. False when one of them cannot be read."""
        parameter = statement.rows(self._key(step) for step in steps)
        try:
            with self._transaction.savepoint():
                ranks = self._transaction.execute(self._query, [parameter]).fetchall()
        except psycopg.Error as caught:
            error = caught
        else:
            for step, (rank,) in zip(steps, ranks, strict=True):
                step.value = rank
            return True
        self._judge(error)
        return False

    def _key(self, step: Step) -> bytes:
        values = step.operation.columns()
        return msgspec.json.encode({name: values[name] for name in self._names})
