"""Which of the watched roots a path belongs to, and whether it concerns any document."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from helena_cli.documents.filter import IGNORE_FILE, Filter
from helena_cli.documents.known import Registry
from helena_cli.documents.roots import Target, outermost, place
from helena_cli.documents.rules import compile_rules
from helena_cli.settings import DocumentSettings


class Scope:
    """The watched parts of some roots. Paths are absolute, without links, as the system has them.

    Nothing here looks at a disk, except for the ignore files of the roots, once.
    """

    def __init__(self, targets: Sequence[Target], settings: DocumentSettings) -> None:
        """Raises ConfigurationError for an ignore file that cannot be used."""
        #: The innermost first: a path belongs to the first that contains it.
        self._targets = sorted(targets, key=lambda target: -len(target.folder.parts))
        self._settings = settings
        self._filters = {target.folder: Filter(target.folder, settings) for target in targets}

    def again(self) -> "Scope":
        """The same, with the ignore files as they are now. Raises ConfigurationError."""
        return Scope(self._targets, self._settings)

    def folders(self) -> list[Path]:
        """What is to be observed: none of them contains another."""
        paths = (
            (target.folder / path).as_posix() for target in self._targets for path in target.within
        )
        return [Path(path or "/") for path in outermost(paths)]

    def concerns(self, path: str, *, is_folder: bool) -> bool:
        """Whether what happens at this path may have to do with a document."""
        found = self._locate(path)
        if found is None:
            return False
        target, within = found
        if not within:
            return is_folder
        if not any(_overlap(within, part) for part in target.within):
            return False
        documents = self._filters[target.folder]
        return (is_folder or documents.is_document(within)) and not documents.ignores_any_part(
            within
        )

    def is_ignore_file(self, path: str) -> bool:
        """Whether this file says what is ignored in a root."""
        found = self._locate(path)
        return found is not None and found[1] == IGNORE_FILE

    def parts(self, paths: Iterable[str]) -> Iterator[Target]:
        """The roots with what has to be looked at in them."""
        wanted: dict[Path, set[str]] = {}
        straight: dict[str, bool] = {}
        for path in paths:
            found = self._locate(path)
            if found is None or not _is_straight(os.path.dirname(path), straight):
                # A folder on the way has become a link: what it leads to is not this root's.
                continue
            target, within = found
            wanted.setdefault(target.folder, set()).add(within)
            for inner in self._targets:
                if str(inner.folder).startswith(f"{path}/"):
                    wanted.setdefault(inner.folder, set()).add("")
        for target in self._targets:
            if target.folder in wanted:
                yield replace(target, within=_clipped(wanted[target.folder], target.within))

    def below(self, folder: Path) -> Iterator[Target]:
        """The roots, whole or in part, that lie in an observed folder."""
        for target in self._targets:
            inside = [
                part for part in target.within if (target.folder / part).is_relative_to(folder)
            ]
            if inside:
                yield replace(target, within=tuple(inside))

    def filter_of(self, target: Target) -> Filter:
        """What is a document in this root."""
        return self._filters[target.folder]

    def _locate(self, path: str) -> tuple[Target, str] | None:
        for target in self._targets:
            folder = str(target.folder)
            if path == folder:
                return target, ""
            inside = os.path.join(folder, "")
            if path.startswith(inside):
                return target, path[len(inside) :]
        return None


def _overlap(path: str, part: str) -> bool:
    """Whether one of these relative paths contains the other; "" contains all."""
    return f"{path}/".startswith(f"{part}/" if part else "") or f"{part}/".startswith(f"{path}/")


def _clipped(paths: Iterable[str], parts: Sequence[str]) -> tuple[str, ...]:
    """These paths, but of one that reaches beyond the watched parts only those."""
    clipped: set[str] = set()
    for path in paths:
        inner = [part for part in parts if part != path and _contains(path, part)]
        clipped.update(inner or [path])
    return tuple(outermost(clipped))


def _contains(path: str, part: str) -> bool:
    return not path or part.startswith(f"{path}/")


def _is_straight(folder: str, known: dict[str, bool]) -> bool:
    if folder not in known:
        known[folder] = os.path.realpath(folder) == folder
    return known[folder]


def claim(
    places: Sequence[Path], settings: DocumentSettings, registry: Registry, host: str
) -> tuple[Scope, list[Target]]:
    """The roots of these places, with their namespaces claimed. Those away are claimed later.

    Raises UsageError for a place outside of every root that does not exist, ConfigurationError and
    NamespaceClaimed for roots that cannot be used, and whatever the registry raises.
    """
    compile_rules(settings.rules)
    targets = place(places, settings, registry.roots(host))
    scope = Scope(targets, settings)
    new = [target for target in targets if not target.claimed and target.folder.is_dir()]
    if not new:
        return scope, targets
    for target in new:
        registry.claim(target.namespace, host, target.key)
    targets = place(places, settings, registry.roots(host))
    return Scope(targets, settings), targets
