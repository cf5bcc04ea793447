"""Compare what is on the disk with what is known, and queue the difference.

This is the one way of documents into the database: a command, a file event and the periodic rescan
all come here, with more or fewer paths. Nothing here asks, prints or deletes.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict, Unpack

from msgspec import Struct

from helena_cli.documents import announce, missing, scan
from helena_cli.documents.candidate import Answer, Candidate, Root
from helena_cli.documents.crew import Crew
from helena_cli.documents.extract import TABLE, document_id
from helena_cli.documents.filter import Filter
from helena_cli.documents.known import Knowledge, Known, Queue, Registry, Sink, State
from helena_cli.documents.names import escape, unescape
from helena_cli.documents.outbox import CHUNK, Change, Failure, Item, Outbox, Triple
from helena_cli.documents.roots import Target, place
from helena_cli.documents.rules import compile_rules
from helena_cli.documents.scan import Found, Unreadable
from helena_cli.settings import DocumentSettings

__all__ = ["Failure", "Options", "Queue", "Registry", "Report", "reconcile", "update"]

#: Documents between two calls of `progress`.
_PROGRESS_STEP = 100

_UNKNOWN = "there is no such file or folder, and no document of that name is known"

#: Documents found so far, how many there are if that is known, and where the scan is.
Progress = Callable[[int, int | None, str], None]


class Options(TypedDict, total=False):
    """How `reconcile` may be varied."""

    #: Look and count, but claim and queue nothing.
    dry_run: bool
    #: Mark missing documents even when they are suspiciously many.
    allow_missing: bool
    #: Asked before missing documents are marked: whether the folders still are what was looked at.
    stands: Callable[[], bool]
    #: Told of each document that is a symbolic link: the file that it leads to, and the link.
    linked: Callable[[str, str], None]
    progress: Progress | None


class Report(Struct, frozen=True):
    """What a run found: found = new + changed + unchanged + failed."""

    found: int
    new: int
    changed: int
    unchanged: int
    #: Known documents that are gone now, marked or not.
    missing: int
    #: Documents for which nothing could be queued.
    failed: int
    #: What is wrong with files that failed, files that have a row all the same, and folders.
    failures: tuple[Failure, ...]
    #: Of the missing ones: those that were not marked, because of the settings or for safety.
    unmarked: int = 0
    #: Folders that could not be judged: unreadable, absent, empty, or with too many missing.
    incomplete: int = 0
    #: Filled in by whoever prunes: deleted documents, and the usage rows that went with them.
    pruned: int = 0
    usage_rows: int = 0


def reconcile(
    paths: Sequence[Path],
    *,
    settings: DocumentSettings,
    host: str,
    registry: Registry,
    queue: Queue,
    **options: Unpack[Options],
) -> Report:
    """Queue what is needed to make the database agree with these folders and files.

    A path that does not exist, inside of a root, is a deletion; a failure when nothing was known
    there. A run that finds no change queues nothing. Raises UsageError for a path that does not
    exist, outside of every root, ConfigurationError and NamespaceClaimed before anything was
    queued, SpoolFull or SpoolUnavailable in the middle.
    """
    targets = place(paths, settings, registry.roots(host))
    compile_rules(settings.rules)
    filters = [Filter(target.folder, settings) for target in targets]
    dry_run = options.get("dry_run", False)
    for target in targets:
        if not target.claimed and target.folder.is_dir():
            registry.claim(target.namespace, host, target.key, dry_run=dry_run)
    state = State(registry, queue, frozenset(target.namespace for target in targets))
    filtered = list(zip(targets, filters, strict=True))
    return _queue_changes(filtered, settings, state, queue, options)


def update(
    targets: Sequence[Target],
    *,
    settings: DocumentSettings,
    state: Knowledge,
    queue: Sink,
    **options: Unpack[Options],
) -> Report:
    """The same for these parts of roots that are claimed already, by what is known of them.

    They are what a file event named: what came and went again, unknown to all, is no failure.
    Raises ConfigurationError before anything was queued, SpoolFull or SpoolUnavailable in the
    middle, and whatever `state` raises.
    """
    filtered = [(target, Filter(target.folder, settings)) for target in targets]
    return _queue_changes(filtered, settings, state, queue, options, events=True)


def _queue_changes(
    targets: Sequence[tuple[Target, Filter]],
    settings: DocumentSettings,
    state: Knowledge,
    queue: Sink,
    options: Options,
    *,
    events: bool = False,
) -> Report:
    dry_run = options.get("dry_run", False)
    run = _Run(settings, state, Outbox(queue, dry_run=dry_run), options, events=events)
    with Crew(settings, run.take, alone=events) as crew:
        for target, documents in targets:
            run.settle(target, documents, crew)
    report = run.finish()
    if run.changes and settings.announce != "none" and not dry_run:
        queue.extend(run.announcement(report, [target for target, _ in targets]))
    return report


class _Run:
    """One pass over some roots, and its counts."""

    def __init__(
        self,
        settings: DocumentSettings,
        state: Knowledge,
        outbox: Outbox,
        options: Options,
        *,
        events: bool,
    ) -> None:
        self._settings = settings
        self._state = state
        self._outbox = outbox
        #: Whether it was file events that named the paths.
        self._events = events
        self._allow_missing = options.get("allow_missing", False)
        self._stands = options.get("stands", lambda: True)
        self._linked = options.get("linked")
        self._progress = options.get("progress")
        self._found = self._unchanged = self._unreadable = 0
        self._unmarked = self._incomplete = 0
        self._notes: list[Failure] = []

    @property
    def changes(self) -> int:
        return self._outbox.counts.total()

    def settle(self, target: Target, documents: Filter, crew: Crew) -> None:
        """Bring one root, or parts of it, up to date."""
        standing = missing.look(target)
        if standing is missing.Standing.ABSENT:
            self._note_folder(target, "", standing.value)
            return
        root = Root(target.namespace, str(target.folder), target.key)
        known = self._known(target, documents)
        if not self._events:
            self._note_unknown(target, documents, known)
        living = sum(not document.deleted for document in known.values())
        unjudged = self._look(target, documents, known, lambda one: crew.read(root, one))
        crew.finish(root)
        self._outbox.flush()
        gone = missing.find(target, known, unjudged)
        if gone and not self._stands():
            self._note_folder(target, "", missing.Standing.ABSENT.value)
        elif gone and self._settings.on_missing == "ignore":
            self._unmarked += len(gone)
        elif gone:
            allowed = self._allow_missing
            doubt = missing.doubt(target, standing, len(gone), living, allowed=allowed)
            self._judge(target, gone, doubt)

    def _look(
        self,
        target: Target,
        documents: Filter,
        known: dict[str, Known],
        read: Callable[[Candidate], None],
    ) -> list[str]:
        """Have read what may have changed; the folders that could not be looked into."""
        unjudged: list[str] = []
        for within in target.within:
            for found in _documents(target, within, documents, self._report_progress):
                if isinstance(found, Unreadable):
                    self._note_folder(target, found.path, found.reason)
                    unjudged.append(found.path)
                    continue
                if found.linked and self._linked is not None:
                    self._linked(found.file, os.path.join(target.folder, unescape(found.path)))
                if candidate := self._compare(target, found, known):
                    read(candidate)
        return unjudged

    def finish(self) -> Report:
        """Queue the rest and count."""
        self._outbox.flush()
        self._report_progress("")
        counts = self._outbox.counts
        return Report(
            found=self._found,
            new=counts["new"],
            changed=counts["changed"],
            unchanged=self._unchanged,
            missing=counts["missing"] + self._unmarked,
            failed=self._unreadable + len(self._outbox.failures),
            failures=(*self._notes, *self._outbox.failures),
            unmarked=self._unmarked,
            incomplete=self._incomplete,
        )

    def announcement(self, report: Report, targets: Sequence[Target]) -> list[Triple]:
        """The message that sums the run up, unless each document has its own; and the context."""
        names = ("found", "new", "changed", "unchanged", "missing", "failed")
        counts = {name: int(getattr(report, name)) for name in names}
        namespaces = {target.namespace for target in targets}
        message, context = announce.batch(counts, namespaces, datetime.now(UTC))
        return [message, context] if self._settings.announce == "batch" else [context]

    def take(self, root: Root, candidate: Candidate, answer: Answer) -> None:
        """Count what became of a candidate, and queue it if it has changed."""
        path = f"{root.key}/{candidate.found.path}"
        document = answer.document
        if document is not None:
            operations: tuple[Triple, ...] = (("insert", TABLE, document.row),)
            operations += self._message(candidate.change, document.doc_id, document.title)
            self._outbox.add(Item(candidate.change, path, operations, answer.weight))
            if document.error:
                self._notes.append(Failure(path, document.error, indexed=True))
        elif answer.reason:
            self._unreadable += 1
            self._notes.append(Failure(path, answer.reason))
        elif not answer.unchanged:
            return
        self._count(candidate.found, unchanged=answer.unchanged)

    def _known(self, target: Target, documents: Filter) -> dict[str, Known]:
        named = _named(target, documents)
        known = self._state.documents(target.namespace, named)
        if named is not None and any(_is_gone(target, path, known) for path in target.within):
            # It may have been a folder with the name of a document.
            known = self._state.documents(target.namespace)
        return known

    def _note_unknown(self, target: Target, documents: Filter, known: Mapping[str, Known]) -> None:
        """Note the paths that were named, but where nothing is or was."""
        gone = [path for path in target.within if path and _is_gone(target, path, known)]
        names = sorted(known) if gone else []
        for path in gone:
            below = f"{document_id(target.namespace, escape(path))}/"
            at = bisect_left(names, below)
            was_folder = at < len(names) and names[at].startswith(below)
            held_root = any(target.folder / path in Path(root).parents for root in target.others)
            if not (was_folder or held_root or documents.ignores_any_part(path)):
                self._note_folder(target, escape(path), _UNKNOWN)

    def _compare(self, target: Target, found: Found, known: dict[str, Known]) -> Candidate | None:
        """What has to be read to see whether it has changed; None for what surely has not."""
        earlier = known.pop(document_id(target.namespace, found.path), None)
        if earlier is None:
            return Candidate(found, "new")
        if earlier.is_surely(found):
            self._count(found, unchanged=True)
            return None
        return Candidate(found, "changed", None if earlier.deleted else earlier.sha256)

    def _count(self, found: Found, *, unchanged: bool = False) -> None:
        self._found += 1
        self._unchanged += unchanged
        if self._found % _PROGRESS_STEP == 0:
            self._report_progress(found.path)

    def _report_progress(self, where: str) -> None:
        if self._progress is not None:
            self._progress(self._found, None, where)

    def _judge(self, target: Target, gone: Sequence[str], doubt: str) -> None:
        """Mark what is missing, unless there is a doubt."""
        if doubt:
            reason = f"{len(gone):,} known documents are missing, none was marked: {doubt}"
            self._note_folder(target, "", reason)
            self._unmarked += len(gone)
            return
        for start in range(0, len(gone), CHUNK):
            self._mark(target, gone[start : start + CHUNK])
            self._report_progress("")

    def _mark(self, target: Target, doc_ids: Sequence[str]) -> None:
        """Queue the mark. The column is replaced as a whole, so the mark carries all of it."""
        now = datetime.now(UTC)
        # One whose row has gone meanwhile needs no mark.
        for doc_id, known in self._state.metadata(doc_ids).items():
            metadata = {**known, "deleted_at": now}
            row = {"es_doc_id": doc_id, "metadata": metadata}
            title = str(metadata.get("title") or doc_id)
            operations = (("update", TABLE, row), *self._message("missing", doc_id, title))
            path = _full(target, doc_id.partition(":")[2])
            self._outbox.add(Item("missing", path, operations))
        self._outbox.flush()

    def _message(self, change: Change, doc_id: str, title: str) -> tuple[Triple, ...]:
        if self._settings.announce != "document":
            return ()
        return (announce.document(change, doc_id, title, datetime.now(UTC)),)

    def _note_folder(self, target: Target, path: str, reason: str) -> None:
        self._incomplete += 1
        self._notes.append(Failure(_full(target, path), reason))


def _documents(
    target: Target, within: str, documents: Filter, entering: Callable[[str], None]
) -> Iterator[Found | Unreadable]:
    """What is at a path of a root: the documents of a folder, a single one, or nothing."""
    path = target.folder / within
    if within and documents.ignores_any_part(within):
        return
    if os.path.isdir(path) and not (within and path.is_symlink()):
        yield from scan.walk(
            target.folder, within, documents=documents, others=target.others, entering=entering
        )
    elif documents.is_document(path.name):
        yield from scan.look(target.folder, within)


def _named(target: Target, documents: Filter) -> list[str] | None:
    """The identifiers of the documents in question, when only single documents were named.

    A file event must not cost a look at all that is known.
    """
    for within in target.within:
        if not documents.is_document(within) or os.path.isdir(target.folder / within):
            return None
    return [document_id(target.namespace, escape(within)) for within in target.within]


def _is_gone(target: Target, path: str, known: Mapping[str, Known]) -> bool:
    """Whether nothing is there, and no document was."""
    if document_id(target.namespace, escape(path)) in known:
        return False
    try:
        os.lstat(target.folder / path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        # It cannot be looked at: reading it says why.
        pass
    return False


def _full(target: Target, path: str) -> str:
    return f"{target.key}/{path}" if path else target.key
