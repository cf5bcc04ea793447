"""Tells a service manager how we are, in the words of sd_notify(3).

A datagram of lines to the socket that NOTIFY_SOCKET names. Without a service manager nothing
happens. Nothing here raises: to be watched over must never end what is watched over.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

from helena_cli import config

logger = logging.getLogger(__name__)

#: A service manager that is stuck must not make us so. Seconds.
PATIENCE = 1.0

#: The manager reads 4096 bytes of a datagram.
STATUS_LIMIT = 1000


class Notifier:
    """The line to the service manager. Make one for the process; its methods suit any thread.

    `watchdog_interval` says how many seconds may pass between two calls of `alive`, half of what
    the manager waits before it ends and restarts us; None when it does not watch.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        if variables is None:
            # Taken away, so that no child speaks in our name.
            variables = config.take("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        self._address = _address(variables.get("NOTIFY_SOCKET", ""))
        self.watchdog_interval = _watchdog_interval(variables) if self._address else None
        self._deaf = False

    def ready(self) -> None:
        """The start, or a reload, is complete."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is read again; `ready` ends it."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """The end has begun."""
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """The work goes on. To be called by what would hang, not by a timer of its own."""
        self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for the person who looks: `systemctl status` and `helena service status`."""
        line = " ".join(text.split())[:STATUS_LIMIT]
        self._tell(f"STATUS={line}")

    def _tell(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(PATIENCE)
                channel.connect(self._address)
                channel.send(message.encode(errors="backslashreplace"))
        except OSError as error:
            # Once: it would be said again every few seconds.
            level = logging.DEBUG if self._deaf else logging.WARNING
            logger.log(level, "The service manager cannot be told %r: %s", message, error)
            self._deaf = True
        else:
            self._deaf = False


def _address(name: str) -> bytes | None:
    """The address of a Unix socket: a path, or a name without a file, which begins with "@"."""
    if name.startswith("@"):
        return b"\0" + os.fsencode(name[1:])
    if name.startswith("/"):
        return os.fsencode(name)
    if name:
        logger.warning("NOTIFY_SOCKET=%s is not a Unix socket; nobody is notified", name)
    return None


def _watchdog_interval(variables: Mapping[str, str]) -> float | None:
    """Half of WATCHDOG_USEC, unless it is meant for another process."""
    if variables.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(variables.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return microseconds / 2_000_000 if microseconds > 0 else None
