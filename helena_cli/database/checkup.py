"""Looks at a database that may hang, with an answer in time whatever it does.

Each look runs in a thread of its own. When the database lets nobody in, another one of the same
server is asked who is in the way: a lock on the system catalogs stops every login, but shows from
there.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Self

import psycopg
from msgspec import Struct
from msgspec.structs import replace

from helena_cli.database.connection import Connection, connect, slots_are_taken
from helena_cli.database.door import Door
from helena_cli.database.elsewhere import PLACES, SHUT
from helena_cli.database.health import Health
from helena_cli.database.probe import (
    NO_ANSWER,
    SECONDS,
    Publish,
    completed,
    probe,
    probe_from_elsewhere,
)
from helena_cli.database.target import Target, database_name
from helena_cli.errors import DatabaseUnreachable, HelenaError

log = logging.getLogger(__name__)

#: When the database has not told of its sessions by then, another one is asked as well.
PATIENCE = 0.7

#: Seconds for what may still come although somebody is known to be in the way.
HOPELESS = 0.3

#: Seconds after which a login that hangs is given up. It is not tried anew before, for each one
#: keeps a slot of the server.
LOGIN = 600.0

TAKEN = (
    "All connections that this role may have are taken. Ask again as a superuser, for whom some "
    "are kept free (HELENA_DSN or --dsn with user=postgres): that shows who holds them. What is "
    "queued stays in the spool."
)


class Examination(Struct, frozen=True):
    """What was found.

    With `error` the database itself could not be asked; `health` is then what another database of
    the server could tell, or None.
    """

    health: Health | None
    error: HelenaError | None = None
    slots_taken: bool = False


class Checkup:
    """Looks at one database, again and again over one connection. Not safe for threads.

    A login that hangs keeps its slot on the server until the lock ends. So nobody knocks again at
    the `door` while that lock is seen from elsewhere; and a `sparing` one, which comes again and
    again, takes its time where nobody answers at all.
    """

    def __init__(
        self, target: Target, door: Door, *, seconds: float = SECONDS, sparing: bool = False
    ) -> None:
        self._target = replace(target, connect_timeout=LOGIN)
        self._database = database_name(target)
        self._door = door
        self._seconds = seconds
        self._sparing = sparing
        self._own: _Look | None = None
        self._aside: _Look | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a look that still hangs is cut off."""
        if self._own is not None:
            self._own.abandon()
            self._own = None

    def look(self, watched: Iterable[str] = ()) -> Examination:
        """Find out what can be found out in time, of Helena's tables and the watched ones."""
        deadline = time.monotonic() + self._seconds
        pause = self._door.pause() if self._sparing else 0.0
        if pause:
            return Examination(None, self._asked_before(pause))
        if self._door.barred:
            found = self._from_elsewhere(deadline)
            if found is not None and found.catalog_lock is not None:
                return Examination(found, self._shut(found))
        own = self._begin(tuple(watched), deadline)
        own.told.wait(PATIENCE)
        elsewhere = self._from_elsewhere(deadline) if own.needs_help else None
        # Behind a lock on the catalogs hardly anything is to be had.
        hopeless = elsewhere is not None and elsewhere.catalog_lock is not None
        own.ended.wait(min(HOPELESS if hopeless else self._seconds, deadline - time.monotonic()))
        return self._examined(own, elsewhere)

    def _begin(self, watched: tuple[str, ...], deadline: float) -> "_Look":
        """A new look over the last one's connection; or the last one, while that still hangs."""
        last = self._own
        # One that was cut ends at once.
        if last is not None and not last.ended.wait(0.2):
            return last
        left = max(0.1, deadline - time.monotonic())

        def open_() -> Connection:
            return connect(self._target, application="status")

        def ask(connection: Connection, publish: Publish) -> None:
            probe(connection, watched, seconds=left, publish=publish)

        self._own = _Look(open_, ask, None if last is None else last.connection)
        return self._own

    def _from_elsewhere(self, deadline: float) -> Health | None:
        """What another database of the server tells in the time that is left."""
        for place in PLACES:
            left = deadline - time.monotonic()
            if self._database in (None, place) or left < 0.1:
                continue
            # One at a time, or they would pile up before a server that says nothing.
            if self._aside is not None and not self._aside.ended.is_set():
                return None
            self._aside = look = self._look_from(place, left)
            look.ended.wait(left)
            # At once, or nobody could copy template1.
            look.abandon()
            if look.health is not None:
                return look.health
        return None

    def _look_from(self, place: str, left: float) -> "_Look":
        def open_() -> Connection:
            return connect(self._target, application="status", database=place)

        def ask(connection: Connection, publish: Publish) -> None:
            name = str(self._database)
            probe_from_elsewhere(connection, name, seconds=left, publish=publish)

        return _Look(open_, ask)

    def _examined(self, own: "_Look", elsewhere: Health | None) -> Examination:
        connected, health, error = own.connection is not None, own.health, own.error
        # One that is still being let in is waited for by the next look.
        if connected and not own.ended.is_set():
            own.abandon()
        if own.bug is not None:
            raise own.bug
        if connected or error is not None:
            self._door.opened()
        if error is not None and slots_are_taken(error):
            return Examination(None, DatabaseUnreachable(str(error), remedy=TAKEN), True)
        if error is not None:
            return Examination(elsewhere, error)
        if health is not None and health.response_ms is not None:
            return Examination(completed(health, elsewhere))
        held = elsewhere is not None and elsewhere.catalog_lock is not None
        if held and not connected:
            self._door.held()
        elif not connected:
            self._door.silent()
        if elsewhere is not None and held:
            return Examination(elsewhere, self._shut(elsewhere))
        return Examination(elsewhere, self._silent())

    def _shut(self, found: Health) -> HelenaError:
        lock = found.catalog_lock
        why = f"{lock.relation} is {lock.reason}" if lock else NO_ANSWER
        return DatabaseUnreachable(
            f"The database {self._target.label} lets nobody in: {why}.",
            remedy="helena clear-locks frees it.",
        )

    def _silent(self) -> HelenaError:
        return DatabaseUnreachable(
            f"The database {self._target.label} did not answer within {self._seconds:g} s.",
            remedy="It hangs, or the way to it does: look at the load of the server, its log and "
            f"the network. {SHUT} What is queued stays in the spool.",
        )

    def _asked_before(self, pause: float) -> HelenaError:
        return DatabaseUnreachable(
            f"The database {self._target.label} did not answer, and is left in peace for another "
            f"{pause:.0f} s: each login that hangs keeps a connection of the server.",
            remedy=f"helena status, without options, asks at once. {SHUT}",
        )


class _Look:
    """A connection and what it told so far; in a daemon thread, for it may hang."""

    def __init__(
        self,
        open_: Callable[[], Connection],
        ask: Callable[[Connection, Publish], None],
        connection: Connection | None = None,
    ) -> None:
        self._open = open_
        self._ask = ask
        self.connection = connection
        self.health: Health | None = None
        self.error: HelenaError | None = None
        self.bug: Exception | None = None
        #: The sessions are known, or will not be.
        self.told = threading.Event()
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._abandoned = False
        threading.Thread(target=self._run, name="look at the database", daemon=True).start()

    @property
    def needs_help(self) -> bool:
        """Whether another database may know more."""
        if self.error is not None:
            return False
        return self.health is None or "lock_waits" in self.health.unknown

    def abandon(self) -> None:
        """Close the connection. One that is in use is cut, which ends the thread."""
        with self._lock:
            self._abandoned = True
            ended, connection = self.ended.is_set(), self.connection
        if connection is None:
            return
        if ended:
            connection.close()
            return
        with suppress(OSError, psycopg.Error):
            line = socket.socket(fileno=os.dup(connection.fileno()))
            with line:
                line.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            if self.connection is None or self.connection.closed:
                self.connection = None
                self.connection = self._open()
            if not self._abandoned:
                self._ask(self.connection, self._publish)
        except HelenaError as error:
            self.error = error
        except Exception as bug:
            # It must not end with the thread: whoever waits for the look raises it.
            log.debug("the look failed", exc_info=True)
            self.bug = bug
        finally:
            with self._lock:
                abandoned = self._abandoned
                self.told.set()
                self.ended.set()
            # Otherwise it is for whoever started this to close it, or to go on with it.
            if abandoned and self.connection is not None:
                self.connection.close()

    def _publish(self, health: Health) -> None:
        self.health = health
        if health.unknown.get("lock_waits") != NO_ANSWER:
            self.told.set()
