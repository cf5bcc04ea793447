"""What a watcher has to look at, and when: paths that settle, and folders as a whole."""

import os
from collections.abc import Callable
from pathlib import Path

from helena_cli.documents.debounce import Debouncer
from helena_cli.settings import WatchSettings

#: After lost events all is looked at so many seconds later: the watches are made anew first.
LOST_PAUSE = 1.0
LOST_WAIT = 5.0

#: Folders that keep coming and going do not delay the look at all around them further, seconds.
TIDY_WAIT = 60.0

#: More paths than this do not settle one by one.
LIMIT = 50_000


class Agenda:
    """Times are those of one clock that does not go backwards, in seconds."""

    def __init__(
        self, settings: WatchSettings, exists: Callable[[str], bool] = os.path.exists
    ) -> None:
        quiet, limit, grace = settings.settle, settings.max_wait, settings.grace
        self._exists = exists
        self._settling: Debouncer[str] = Debouncer(quiet=quiet, max_wait=limit)
        self._gone: Debouncer[str] = Debouncer(quiet=grace, max_wait=grace)
        self._lost: Debouncer[Path] = Debouncer(quiet=LOST_PAUSE, max_wait=LOST_WAIT)
        self._tidy: Debouncer[Path] = Debouncer(quiet=limit + grace + quiet, max_wait=TIDY_WAIT)
        #: Folders, with whether many missing documents are to be believed.
        self._wanted: dict[Path, bool] = {}

    def __len__(self) -> int:
        """How many paths settle."""
        return len(self._settling) + len(self._gone)

    def touched(self, path: str, now: float) -> bool:
        """Something happened to this path. False when there are too many: none is kept then."""
        self._settling.offer(path, now)
        if len(self._settling) <= LIMIT:
            return True
        self._settling.take_all()
        return False

    def stirred(self, folder: Path, now: float) -> None:
        """Folders came or went in this one: when that is over, all of it is to be looked at."""
        self._tidy.offer(folder, now)

    def lost(self, folder: Path, now: float) -> None:
        """Events of this folder were lost."""
        self._lost.offer(folder, now)

    def want(self, folder: Path, *, allow_missing: bool = False) -> None:
        """All of this folder is to be looked at, now."""
        self._wanted[folder] = self._wanted.get(folder, False) or allow_missing

    def take_paths(self, now: float) -> list[str]:
        """The paths to look at now.

        One that is gone has its time of grace first: some editors delete before they write anew.
        So has a link that leads nowhere, for it may be its file that they delete.
        """
        present = []
        for path in self._settling.take(now):
            if self._exists(path):
                present.append(path)
            else:
                self._gone.offer(path, now)
        return present + self._gone.take(now)

    def take_all_paths(self) -> list[str]:
        """All paths, settled or not."""
        return self._settling.take_all() + self._gone.take_all()

    def forget(self, folder: Path) -> None:
        """Paths in this folder do not settle any more: what happened to them was in another one."""
        inside = os.path.join(folder, "")
        for part in (self._settling, self._gone):
            part.forget(lambda path: path == str(folder) or path.startswith(inside))

    def folders(self, now: float) -> dict[Path, bool]:
        """The folders to look at completely now, until they are `done`."""
        for folder in self._tidy.take(now):
            self.want(folder)
        for folder in self._lost.take(now):
            # They stood all the time: what is missing was deleted.
            self.want(folder, allow_missing=True)
        return dict(self._wanted)

    def done(self, folder: Path) -> None:
        """This folder was looked at, or waits for something else."""
        self._wanted.pop(folder, None)

    def next_due(self) -> float | None:
        """When there is something to do, None when there is nothing that waits."""
        parts = (self._settling, self._gone, self._lost, self._tidy)
        times = [at for part in parts if (at := part.next_due()) is not None]
        return min(times, default=None)
