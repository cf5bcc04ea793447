"""Waiting until something has been left alone: pure, the caller brings the clock."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Debouncer(Generic[Key]):
    """Keys that were offered, each kept until it has been quiet for a while.

    A key that is offered again and again is due `max_wait` after the first time all the same.
    Seconds on any clock that does not go backwards.
    """

    def __init__(self, *, quiet: float, max_wait: float) -> None:
        self._quiet = quiet
        self._max_wait = max_wait
        #: Key → when it was offered first, and when it is due.
        self._waiting: dict[Key, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, key: Key, now: float) -> None:
        """Something happened to this key."""
        first, _ = self._waiting.get(key, (now, now))
        self._waiting[key] = first, min(now + self._quiet, first + self._max_wait)

    def take(self, now: float) -> list[Key]:
        """The keys that are due, in the order of their first offer; they are forgotten."""
        due = [key for key, (_, at) in self._waiting.items() if at <= now]
        for key in due:
            del self._waiting[key]
        return due

    def take_all(self) -> list[Key]:
        """All keys, due or not; they are forgotten."""
        keys = list(self._waiting)
        self._waiting.clear()
        return keys

    def forget(self, unwanted: Callable[[Key], bool]) -> None:
        """Let go of these keys."""
        self._waiting = {key: at for key, at in self._waiting.items() if not unwanted(key)}

    def next_due(self) -> float | None:
        """When the next key is due, None when there is none."""
        return min((at for _, at in self._waiting.values()), default=None)
