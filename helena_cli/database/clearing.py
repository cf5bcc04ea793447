"""Does what a plan says, to nothing but the sessions that were looked at, and looks at the result.

Between the look and the deed a session may have ended, and its pid may be another's by now. So each
signal is sent by the statement that finds the session once more as it was.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import psycopg
from msgspec import Struct
from psycopg import sql

from helena_cli.database.blocking import Look
from helena_cli.database.connection import translate
from helena_cli.database.locks import PAUSE, Server, ask, lasting_look, look
from helena_cli.database.relief import Action, Deed, Plan
from helena_cli.errors import DatabaseRefused

log = logging.getLogger(__name__)

#: Seconds that a signal gets to work, and that the sessions which were freed get to go on.
PATIENCE = 2.0

_TICK = 0.05

# A session that holds others up is known by its transaction; one that holds up nobody by its query
# too, for the next one may be in order. backend_start alone tells a pid that was used again.
_SIGNAL = """
SELECT {function}(pid) AS sent FROM pg_catalog.pg_stat_activity
 WHERE pid = %(pid)s AND pid <> pg_backend_pid() AND datname = %(database)s
   AND backend_type = 'client backend' AND backend_start = %(backend_start)s
   AND xact_start IS NOT DISTINCT FROM %(xact_start)s AND state IS NOT DISTINCT FROM %(state)s
   AND (%(blocks)s OR state_change IS NOT DISTINCT FROM %(state_change)s)
"""

_THERE = """
SELECT state, query_start FROM pg_catalog.pg_stat_activity
 WHERE pid = %(pid)s AND backend_start = %(backend_start)s
"""

_PREPARED = "SELECT 1 FROM pg_catalog.pg_prepared_xacts WHERE gid = %s AND prepared = %s"


class Done(Struct, frozen=True):
    """What became of an action, and whether it did its work."""

    action: Action
    result: str
    succeeded: bool
    #: The session is still there, though its query was cancelled: only terminating it is left.
    cancelled: bool = False


def apply(server: Server, actions: Sequence[Action]) -> list[Done]:
    """Do all of them, and wait until they have worked; terminate what a cancel did not stop.

    Raises DatabaseUnreachable. A refusal is a result.
    """
    deeds = [_Deed(server, action) for action in actions]
    for deed in deeds:
        deed.do(deed.action.deed)
    _wait(deeds)
    for deed in deeds:
        if deed.pending and deed.action.deed == "cancel":
            deed.do("terminate")
    _wait(deeds)
    done = [deed.judge() for deed in deeds]
    for one in done:
        log.info("%s %s: %s", one.action.deed, one.action.session.label, one.result)
    return done


def settled(server: Server, plan: Plan) -> Look:
    """A look at what still blocks, after those who were freed had time to go on."""
    deadline = time.monotonic() + PATIENCE
    now = look(server)
    while now.edges().keys() & plan.edges.keys() and time.monotonic() < deadline:
        time.sleep(PAUSE / 5)
        now = look(server)
    return lasting_look(server) if now.edges() else now


class _Deed:
    """One action on its way."""

    def __init__(self, server: Server, action: Action) -> None:
        self.action = action
        self._server = server
        self._now: Deed = action.deed
        #: "" while it is not known yet whether it works.
        self._result = ""

    @property
    def pending(self) -> bool:
        """Whether a signal was sent and has not worked yet."""
        return not self._result and not self._has_worked()

    def do(self, deed: Deed) -> None:
        """Send one signal, or roll back."""
        self._now = deed
        try:
            self._result = self._roll_back() if deed == "rollback prepared" else self._signal()
        except DatabaseRefused as error:
            self._result = str(error)

    def judge(self) -> Done:
        """What became of it."""
        known = {
            "rolled back": ("rolled back", True),
            "gone": ("had ended by itself", True),
            # Who held up nobody did no harm by going on.
            "changed": ("is at something else by now; not touched", not self.action.frees),
        }
        if self._result:
            return Done(self.action, *known.get(self._result, (self._result, False)))
        if self.pending:
            return Done(self.action, f"did not end within {PATIENCE:.0f} s", False)
        if self._now == "cancel":
            return Done(self.action, "cancelled", True, cancelled=True)
        in_vain = self.action.deed == "cancel"
        return Done(
            self.action, "terminated" + (": to cancel its query did not help" * in_vain), True
        )

    def _signal(self) -> str:
        session = self.action.session
        function = "pg_cancel_backend" if self._now == "cancel" else "pg_terminate_backend"
        values = {
            **self._identity,
            "database": session.database,
            "xact_start": session.xact_start,
            "state": session.state,
            "state_change": session.state_change,
            "blocks": self.action.frees > 0,
        }
        rows = ask(self._server, _SIGNAL.format(function=function), values)
        if not rows:
            return "changed" if self._find() else "gone"
        return "" if rows[0]["sent"] else "gone"

    def _roll_back(self) -> str:
        gid = self.action.session.gid
        # It runs in no transaction, so the check can only come before it.
        if not ask(self._server, _PREPARED, [gid, self.action.session.xact_start]):
            return "gone"
        try:
            self._server.connection.execute(
                sql.SQL("ROLLBACK PREPARED {}").format(gid), prepare=False
            )
        except psycopg.Error as error:
            raise translate(error) from error
        return "rolled back"

    def _has_worked(self) -> bool:
        found = self._find()
        if not found or self._now != "cancel":
            return not found
        session = self.action.session
        now = found[0]["state"], found[0]["query_start"]
        return now != ("active", session.query_start)

    def _find(self) -> list[dict[str, Any]]:
        return ask(self._server, _THERE, self._identity)

    @property
    def _identity(self) -> dict[str, Any]:
        session = self.action.session
        return {"pid": session.pid, "backend_start": session.backend_start}


def _wait(deeds: Sequence[_Deed]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(deed.pending for deed in deeds) and time.monotonic() < deadline:
        time.sleep(_TICK)
