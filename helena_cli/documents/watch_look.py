"""Looking at paths and folders by what is known of them; what does not succeed is done later."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from helena_cli.documents import watch_troubles
from helena_cli.documents.memory import Memory
from helena_cli.documents.names import escape
from helena_cli.documents.reconcile import Report, update
from helena_cli.documents.roots import Target
from helena_cli.documents.watch_scope import Scope
from helena_cli.documents.watch_troubles import Problems, Troubles
from helena_cli.errors import HelenaError
from helena_cli.settings import DocumentSettings

#: More paths than this do not wait one by one: all of their root is looked at instead.
LIMIT = 10_000


class Looker:
    """Brings the queue up to date with the disk, a path or a folder at a time.

    `stands` tells of a root whether what is missing in it is really gone; `progress` is called
    again and again during a long look, and may end it with an exception.
    """

    def __init__(
        self, memory: Memory, *, stands: Callable[[Path], bool], progress: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._stands = stands
        self._progress = progress
        self._settings = DocumentSettings()
        self._scope = Scope((), self._settings)
        self.problems = Problems()
        self.troubles = Troubles()
        #: The files that documents are links to, with these links.
        self._links: dict[str, set[str]] = {}
        #: What could not be looked at, with whether many missing documents are to be believed.
        self.deferred: dict[str, bool] = {}

    def use(self, scope: Scope, settings: DocumentSettings) -> None:
        """Look at these roots from now on."""
        self._scope, self._settings = scope, settings

    def with_links(self, paths: dict[str, bool]) -> dict[str, bool]:
        """These paths, and the links to them: what happens to a file happens to its links."""
        links = {link: False for path in paths for link in self._links.get(path, ())}
        return {**links, **paths}

    def paths(self, paths: Iterable[str], *, allow_missing: bool = False) -> None:
        """Look at what lies, or lay, at these paths."""
        for target in self._scope.parts(paths):
            self._update(target, allow_missing=allow_missing)

    def folder(self, path: Path, *, allow_missing: bool) -> bool:
        """Look at all that is watched in an observed folder; whether that succeeded."""
        done = [
            self._update(target, allow_missing=allow_missing) for target in self._scope.below(path)
        ]
        return all(done)

    def retry(self) -> None:
        """Look again at what could not be looked at."""
        deferred, self.deferred = self.deferred, {}
        for allowed in (False, True):
            self.paths(
                (path for path, allow in deferred.items() if allow == allowed),
                allow_missing=allowed,
            )

    def forget(self, folder: Path) -> None:
        """What could not be looked at in this folder was in another one that stood there."""
        self.troubles.forget(folder)
        self.deferred = {
            path: allowed
            for path, allowed in self.deferred.items()
            if not Path(path).is_relative_to(folder)
        }

    def failure(self) -> str | None:
        """Why the last look did not succeed, None when it did."""
        return self.problems.first() or self.troubles.first()

    def _update(self, target: Target, *, allow_missing: bool) -> bool:
        if not target.claimed:
            return False
        try:
            with self._memory.connected():
                report = update(
                    [target],
                    settings=self._settings,
                    state=self._memory,
                    queue=self._memory,
                    allow_missing=allow_missing,
                    stands=partial(self._stands, target.folder),
                    linked=lambda file, link: self._links.setdefault(file, set()).add(link),
                    progress=lambda done, total, where: self._progress(),
                )
        except HelenaError as error:
            self.problems.note(target.key, error)
            self._defer(target, allow_missing=allow_missing)
            return False
        # Another part of it may still be waiting for the database.
        base = str(target.folder)
        if not any(f"{path}{os.sep}".startswith(f"{base}{os.sep}") for path in self.deferred):
            self.problems.clear(target.key)
        self._hear(target, report)
        return True

    def _defer(self, target: Target, *, allow_missing: bool) -> None:
        for part in target.within:
            path = os.path.join(target.folder, part) if part else str(target.folder)
            self.deferred[path] = allow_missing or self.deferred.get(path, False)
        if len(self.deferred) > LIMIT:
            # Some of them were seen to go: what is missing then is not to be doubted.
            self.deferred = {str(one.folder): True for one in self._scope.parts(self.deferred)}

    def _hear(self, target: Target, report: Report) -> None:
        """Retry what failed, and report what goes on failing."""
        bases = [f"{target.key}/{escape(part)}".rstrip("/") for part in target.within]

        def looked_at(path: str) -> bool:
            return any(f"{path}/".startswith(f"{base}/") for base in bases)

        watch_troubles.say(report.failures)
        for failure in self.troubles.note(report.failures, looked_at):
            self._memory.failed(failure.path)
