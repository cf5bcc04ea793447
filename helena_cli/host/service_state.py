"""What a service manager says of the service."""

import psutil
from msgspec import Struct


class ServiceState(Struct, frozen=True):
    """The service at one moment."""

    #: Whether its file is there.
    installed: bool
    #: Whether it starts by itself at the next login or boot.
    enabled: bool
    #: Whether it runs, and has said that it is ready where it can say so.
    active: bool
    #: In the service manager's own words.
    state: str
    pid: int | None = None
    #: When its process began, Unix time.
    since: float | None = None
    #: How often the service manager has started it again.
    restarts: int | None = None
    #: How the last process ended, a signal as a negative number; None for one that runs, or never
    #: ran.
    exit_code: int | None = None
    #: What it last said of itself.
    text: str = ""


def started_at(pid: int | None) -> float | None:
    """When a process began, Unix time; None when there is none."""
    try:
        return psutil.Process(pid).create_time() if pid else None
    except psutil.Error:
        return None
