"""Stops at every step of accepting and flushing, injected into a process that is to die there."""

import os
import signal
from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest.mock import patch

import psycopg

from helena_cli.batch import inbox, ledger
from helena_cli.batch.inbox import Inbox
from helena_cli.batch.spool import Spool
from helena_cli.batch.spoolfile import SpoolFile
from helena_cli.database import position
from helena_cli.database.transaction import Transaction

#: What is done in a step, and where: each can be stopped before and after.
ACCEPTING: dict[str, tuple[Any, str]] = {
    "ids given out": (Inbox, "_next_ids"),
    "record counted": (inbox, "_set_bounds"),
}
FLUSHING: dict[str, tuple[Any, str]] = {
    "inbox read": (Spool, "straight"),
    "spool read": (Spool, "take"),
    "inbox folded": (SpoolFile, "_fold_inbox"),
    "read ahead": (Spool, "read_ahead"),
    "nonce stored": (Spool, "remember_nonce"),
    "begin": (Transaction, "begin"),
    "position read": (position, "lock"),
    "group written": (Transaction, "write"),
    "group copied": (Transaction, "copy"),
    "position moved": (position, "advance"),
    "dead letters stored": (Spool, "bury"),
    "disk synced": (Spool, "sync"),
    "COMMIT": (Transaction, "commit"),
    "settled straight": (Spool, "settle_straight"),
    "settled": (Spool, "settle"),
    "inbox released": (Inbox, "release"),
    "flush recorded": (ledger, "record"),
}

#: Those that an operation comes to only when another one of its table is put back or refused.
ROUGH = ("spool read", "inbox folded", "dead letters stored", "settled")

#: Those that it comes to when nothing waits in the tables.
SMOOTH = ("read ahead", "settled straight")

#: Within these there is no before and after.
HALF_A_RECORD = "half of a record written"
COMMIT_SENT = "COMMIT sent, no answer yet"

STEPS = (
    *(f"{when} {step}" for step in (*ACCEPTING, *FLUSHING) for when in ("before", "after")),
    HALF_A_RECORD,
    COMMIT_SENT,
)


class _Stop:
    """Halts the process when it comes to a step for the nth time."""

    def __init__(self, step: str, skip: int, halt: str) -> None:
        self.step = step
        self._skip = skip
        self._signal = signal.Signals[halt]
        self._done = False

    def reached(self, step: str) -> bool:
        """Halt if this is the step; whether that was so, for a process that goes on."""
        if step != self.step or self._done:
            return False
        self._skip -= 1
        if self._skip >= 0:
            return False
        self._done = True
        os.kill(os.getpid(), self._signal)
        return True


def arm(step: str, skip: int, halt: str) -> None:
    """Let this process get SIGKILL or SIGSTOP (`halt`) at a step that it has passed `skip` times.

    A process that is woken up again goes on.
    """
    stop = _Stop(step, skip, halt)
    for name, (owner, attribute) in (ACCEPTING | FLUSHING).items():
        setattr(owner, attribute, _around(getattr(owner, attribute), name, stop))
    if step == HALF_A_RECORD:
        _tear(stop)
    if step == COMMIT_SENT:
        _lose_the_answer(stop)


def _around(function: Callable[..., Any], name: str, stop: _Stop) -> Callable[..., Any]:
    @wraps(function)
    def stopping(*arguments: Any, **named: Any) -> Any:
        stop.reached(f"before {name}")
        result = function(*arguments, **named)
        stop.reached(f"after {name}")
        return result

    return stopping


def _tear(stop: _Stop) -> None:
    """Stop when a part of a record is in the file."""
    pwrite = os.pwrite

    def half(fd: int, data: bytes, at: int) -> int:
        if at < inbox.PAGE:
            return pwrite(fd, data, at)
        written = pwrite(fd, data[: len(data) // 2], at)
        stop.reached(HALF_A_RECORD)
        return written

    patch.object(os, "pwrite", half).start()


def _lose_the_answer(stop: _Stop) -> None:
    """Stop when the server has been told to commit and has not answered."""
    commit = Transaction.commit

    def sending(transaction: Transaction) -> None:
        if stop.step != COMMIT_SENT:
            commit(transaction)
            return
        transaction._catch_up()
        connection = transaction._cursor.connection
        connection.pgconn.send_query(b"COMMIT")
        connection.pgconn.flush()
        if stop.reached(COMMIT_SENT):
            connection.close()
            raise psycopg.OperationalError("the answer to COMMIT was lost")
        result = connection.pgconn.get_result()
        while connection.pgconn.get_result():
            pass
        if result is None or result.command_status != b"COMMIT":
            connection.close()
            raise psycopg.OperationalError("COMMIT failed")

    patch.object(Transaction, "commit", sending).start()
