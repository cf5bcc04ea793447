"""Looks at the queue and at the database, for the checklist. Never waits long for either."""

import time
from typing import TYPE_CHECKING, Self

from helena_cli.cli.checks import Check, Observed, judge
from helena_cli.database.checkup import Checkup, Examination
from helena_cli.errors import DatabaseRefused, DatabaseUnreachable

if TYPE_CHECKING:
    from helena_cli.runtime import Runtime


class Observer:
    """Looks as often as it is asked to, over one connection. A context manager."""

    def __init__(self, runtime: "Runtime", *, sparing: bool = False) -> None:
        self._runtime = runtime
        self._sparing = sparing
        self._checkup: Checkup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkup is not None:
            self._checkup.close()

    def look(self) -> Observed:
        """Everything that the checks look at. Raises SpoolError when the queue cannot be read."""
        spool = self._runtime.spool
        # The database first: the queue that is shown beside it is then the latest.
        examination = self._examine([lane.table for lane in spool.lanes()])
        return Observed(
            queue=spool.queue(),
            lanes=spool.lanes(),
            flushes=spool.flushes(),
            flusher=spool.flusher(),
            flusher_running=self._runtime.flusher_running(),
            health=examination.health,
            now=time.time(),
            lost=spool.lost(),
            away=examination.error,
            slots_taken=examination.slots_taken,
        )

    def checks(self) -> list[Check]:
        """The checklist, judged by the limits that are set."""
        return judge(self.look(), self._runtime.settings.checks)

    def _examine(self, tables: list[str]) -> Examination:
        try:
            if self._checkup is None:
                self._checkup = self._runtime.checkup(sparing=self._sparing)
        except (DatabaseUnreachable, DatabaseRefused) as error:
            return Examination(None, error)
        return self._checkup.look(tables)
