"""Which root, and so which namespace, a path belongs to.

A root is a folder whose documents share a namespace: `namespace:relative/path.md`. A path belongs
to the innermost root that contains it, so no file ever has two identifiers.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from helena_cli.documents.names import escape, unescape
from helena_cli.errors import ConfigurationError, NamespaceClaimed, UsageError
from helena_cli.settings import DocumentSettings

logger = logging.getLogger(__name__)


class Target(Struct, frozen=True):
    """A root, and what is to be looked at in it."""

    namespace: str
    #: Absolute, without symbolic links.
    folder: Path
    #: Paths relative to it, with slashes; "" is all of it. None contains another.
    within: tuple[str, ...]
    #: Whether the namespace is this folder's already.
    claimed: bool
    #: Roots below this one, absolute: their documents are not this root's.
    others: frozenset[str] = frozenset()
    #: A folder around it was asked for: when this one is gone, it was deleted.
    nested: bool = False

    @property
    def key(self) -> str:
        """The folder as text that PostgreSQL accepts."""
        return escape(self.folder.as_posix())


def place(
    paths: Sequence[Path], settings: DocumentSettings, known: Iterable[tuple[str, str]]
) -> list[Target]:
    """Find the root of each path; `known` are the (namespace, folder) that this host has claimed.

    A folder outside of every known and configured root becomes a root, as does the folder of a
    single file. Raises UsageError for a path outside of every root that does not exist,
    ConfigurationError and NamespaceClaimed for new roots that cannot have their namespace.
    """
    claims = {Path(unescape(folder)): namespace for namespace, folder in sorted(known)}
    roots = {*claims, *(_resolve(Path(root)) for root in settings.roots)}
    wanted: dict[Path, set[Path]] = {}
    nested: set[Path] = set()
    # Folders first and from the outside: what lies in one of them belongs to it.
    for path in sorted(map(_resolve, paths), key=_outside_in):
        root = _innermost(path, roots) or _new_root(path)
        roots.add(root)
        wanted.setdefault(root, set()).add(path)
        for inner in roots:
            if path in inner.parents:
                wanted.setdefault(inner, set()).add(inner)
                nested.add(inner)
    namespaces = claims | _name([root for root in wanted if root not in claims], settings)
    for root in wanted.keys() & claims.keys():
        if settings.namespace not in ("", claims[root]):
            logger.warning("%s keeps its namespace %s", root, claims[root])
    return [
        Target(
            namespace=namespaces[root],
            folder=root,
            within=tuple(outermost(path.relative_to(root).as_posix() for path in inside)),
            claimed=root in claims,
            others=frozenset(str(other) for other in roots if root in other.parents),
            nested=root in nested,
        )
        for root, inside in sorted(wanted.items())
    ]


def _resolve(path: Path) -> Path:
    """Absolute and without links, except that a link to a file stays that link."""
    if not os.path.lexists(path):
        # No shell expands it in a configuration file.
        path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _outside_in(path: Path) -> tuple[bool, int]:
    return not os.path.isdir(path), len(path.parts)


def _innermost(path: Path, roots: set[Path]) -> Path | None:
    return next((folder for folder in (path, *path.parents) if folder in roots), None)


def _new_root(path: Path) -> Path:
    if os.path.isdir(path):
        return path
    if not os.path.lexists(path):
        raise UsageError(
            f"There is no file or folder {path}.", remedy="Check the path, and that it is mounted."
        )
    return path.parent


def outermost(paths: Iterable[str]) -> Iterator[str]:
    """The paths of which no other one contains them. "." becomes ""."""
    last = None
    # With a slash at the end a folder sorts right before what it contains.
    for path in sorted({"" if path == "." else f"{path}/" for path in paths}):
        if last is None or not path.startswith(last):
            last = path
            yield path.rstrip("/")


def _name(folders: Sequence[Path], settings: DocumentSettings) -> dict[Path, str]:
    """The namespaces of new roots: the configured one, or the names of the folders."""
    configured = settings.namespace
    if not configured:
        names = {folder: default_namespace(folder) for folder in folders}
    else:
        _check_namespace(configured)
        if len(folders) > 1:
            raise ConfigurationError(
                f"The namespace {configured!r} can name one folder only, not "
                f"{' and '.join(map(str, folders))}.",
                remedy="Leave [documents] namespace empty, so that each folder gives its own name, "
                "or index the new folders one by one with HELENA_DOCUMENTS_NAMESPACE.",
            )
        names = dict.fromkeys(folders, configured)
    owners: dict[str, Path] = {}
    for folder, name in names.items():
        if owners.setdefault(name, folder) != folder:
            raise NamespaceClaimed(
                f"Both {owners[name]} and {folder} would have the namespace {name!r}.",
                remedy=f"Name one of them: HELENA_DOCUMENTS_NAMESPACE=NAME helena process-pending "
                f"{folder}",
            )
    return names


def default_namespace(folder: Path) -> str:
    """The name of a folder. Without colons: the first one ends the namespace in an identifier."""
    return escape(folder.name).replace(":", r"\x3a") or "root"


def _check_namespace(name: str) -> None:
    if ":" in name or escape(name) != name or len(name) > 255 or not name.isprintable():
        raise ConfigurationError(
            f"[documents] namespace: {name!r} cannot be a namespace.",
            remedy="Use up to 255 characters without colon and backslash.",
        )
