"""What a running watcher can say of itself: for the live view, the log and the health check."""

from typing import Literal

from msgspec import Struct


class WatchedRoot(Struct, frozen=True):
    """One watched folder; `reason` says why it is polled or away."""

    path: str
    mode: Literal["events", "polling", "away"]
    reason: str = ""


class DocumentChange(Struct, frozen=True):
    """A document that was queued, or could not be, and when (Unix time)."""

    at: float
    path: str
    change: Literal["new", "changed", "missing", "failed"]


class WatchState(Struct, frozen=True):
    """The watcher at one moment."""

    roots: tuple[WatchedRoot, ...] = ()
    #: Paths that were saved a moment ago and are waited for.
    settling: int = 0
    #: The last documents, newest first.
    changes: tuple[DocumentChange, ...] = ()
    #: Unix time of the last complete look at all folders.
    last_full: float | None = None
    #: Why the last look did not succeed; None when it did.
    failure: str | None = None
