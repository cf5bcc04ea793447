"""Task files that programs left for Helena: `{"file_path": "docs/a.md"}`, index that document.

A task whose reader died before it was put away is done again: a document that has been indexed
already is found unchanged.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from helena_cli.batch.claims import Claimed
from helena_cli.documents.filter import Filter
from helena_cli.documents.json_files import JsonFiles, PendingReport
from helena_cli.documents.names import escape, unescape
from helena_cli.documents.reconcile import Report
from helena_cli.documents.roots import place
from helena_cli.settings import DocumentSettings

#: The subfolders of the folder of tasks.
QUEUES = ("realtime_queue", "batch_queue")


class Tasks:
    """The task files that wait, and the documents that they name. A context manager.

    On leaving, tasks that were not settled go back to where they lay.
    """

    def __init__(self, folder: Path, *, base: Path, max_bytes: int, dry_run: bool = False) -> None:
        """`base` is the folder that relative paths start from."""
        self._base = Path(os.path.realpath(base))
        self._queues = [
            JsonFiles(folder / name, max_bytes=max_bytes, dry_run=dry_run) for name in QUEUES
        ]
        self._stack = ExitStack()
        self._tasks: list[tuple[JsonFiles, Claimed, Path]] = []

    def __enter__(self) -> "Tasks":
        """Raises HelenaError when a folder cannot be used, or another process keeps it."""
        with ExitStack() as stack:
            for queue in self._queues:
                stack.enter_context(queue)
                for file, content in queue.read():
                    self._take(queue, file, content.values)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def documents(self) -> list[Path]:
        """What is to be indexed."""
        return [path for _, _, path in self._tasks]

    def select(
        self, settings: DocumentSettings, known: Sequence[tuple[str, str]], places: Sequence[Path]
    ) -> DocumentSettings:
        """Refuse tasks whose documents would be passed over; the settings to index the others with.

        One outside of every root, of the `places` that are indexed too and of the base is refused:
        whoever may leave tasks may not publish what else can be read here. One below the base
        belongs to the first folder on its way, as if that had been named. Raises ConfigurationError
        as `place` does.
        """
        roots = {Path(unescape(folder)) for _, folder in known}
        roots |= {Path(os.path.realpath(path)) for path in (*map(Path, settings.roots), *places)}
        self._refuse_outsiders({*roots, self._base})
        new = {self._root_of(path) for path in self.documents if roots.isdisjoint(path.parents)}
        extended = replace(settings, roots=(*settings.roots, *sorted(new)))
        filters: dict[Path, Filter] = {}
        tasks, self._tasks = self._tasks, []
        for queue, file, path in tasks:
            (target,) = place([path], extended, known)
            if target.folder not in filters:
                filters[target.folder] = Filter(target.folder, extended)
            documents = filters[target.folder]
            if documents.is_document(path.name) and not any(
                map(documents.ignores_any_part, target.within)
            ):
                self._tasks.append((queue, file, path))
            else:
                queue.fail(file, f"{_shown(path)} is no document by [documents] extensions, ignore")
        return extended

    def settle(self, indexed: Report | None) -> PendingReport:
        """Put the tasks away, with what came of their documents; None when there were none."""
        failures = indexed.failures if indexed else ()
        reasons = {one.path: one.reason for one in failures if not one.indexed}
        for queue, file, path in self._tasks:
            if reason := reasons.get(_shown(path)):
                queue.fail(file, f"{_shown(path)}: {reason}")
            else:
                queue.accept(file)
        self._tasks = []
        return sum((queue.report() for queue in self._queues), PendingReport())

    def _refuse_outsiders(self, folders: Collection[Path]) -> None:
        tasks, self._tasks = self._tasks, []
        for queue, file, path in tasks:
            if any(folder in path.parents or folder == path for folder in folders):
                self._tasks.append((queue, file, path))
            else:
                reason = "lies in no folder that is indexed; helena process-pending FOLDER adds it"
                queue.fail(file, f"{_shown(path)} {reason}")

    def _take(self, queue: JsonFiles, file: Claimed, values: Mapping[str, Any]) -> None:
        named = values.get("file_path")
        if not isinstance(named, str) or not named.strip() or "\0" in named:
            queue.fail(file, "file_path: it must be the path of a document")
            return
        path = self._base / named
        # As documents are found: a link to a folder is followed, one to a file is not.
        path = Path(os.path.realpath(path.parent), path.name)
        if os.path.isfile(path):
            self._tasks.append((queue, file, path))
        else:
            queue.fail(file, f"file_path: there is no file {_shown(path)}")

    def _root_of(self, path: Path) -> str:
        first, *rest = path.relative_to(self._base).parts
        return str(self._base / first if rest else self._base)


def _shown(path: Path) -> str:
    """The path as reports have it."""
    return escape(path.as_posix())
