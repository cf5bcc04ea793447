"""Finding the documents of a folder, and reading one of them.

Nothing but regular files is ever opened, nothing outside of the root is ever read, and what is
ignored is not even walked.
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from msgspec import Struct

from helena_cli.documents.extract import TEXT_BYTES, Source
from helena_cli.documents.filter import Filter
from helena_cli.documents.names import escape

#: Divides TEXT_BYTES. Bytes.
_CHUNK = 256 * 1024
#: A pipe in place of a file must not block, a link in its place must not lead elsewhere.
_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class Found(Struct, frozen=True, gc=False):
    """A document on the disk."""

    #: What to open; of a symbolic link, its target.
    file: str
    #: Relative to the root, with slashes, escaped.
    path: str
    size: int
    modified_ns: int
    changed_ns: int
    #: Whether the path is a symbolic link.
    linked: bool = False


class Unreadable(Struct, frozen=True, gc=False):
    """A folder that could not be listed: nobody knows what is in it. "" is the root."""

    path: str
    reason: str


def walk(
    root: Path,
    within: str,
    *,
    documents: Filter,
    others: frozenset[str] = frozenset(),
    entering: Callable[[str], None] = lambda folder: None,
) -> Iterator[Found | Unreadable]:
    """Find the documents of a root, or of one folder in it, in the order of their names.

    `within` is relative to the root with slashes, unescaped, "" for all of it. Folders in `others`
    (absolute) are roots of their own and left out. A folder that vanishes meanwhile is empty.
    `entering` is told of each folder.
    """
    inside = os.path.join(root, "")
    pending = [within]
    while pending:
        folder = pending.pop()
        entering(folder)
        try:
            with os.scandir(os.path.join(root, folder)) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield Unreadable(escape(folder), error.strerror or str(error))
            continue
        prefix = f"{folder}/" if folder else ""
        below = []
        for entry in entries:
            path = prefix + entry.name
            if _is_folder(entry):
                if entry.path not in others and not documents.ignores(f"{path}/"):
                    below.append(path)
            elif documents.is_document(entry.name) and not documents.ignores(path):
                yield from _document(entry.path, path, inside, entry.stat)
        pending.extend(reversed(below))


def look(root: Path, within: str) -> Iterator[Found]:
    """The one document at a path inside of a root, if there is one."""
    file = os.path.join(root, within)
    yield from _document(file, within, os.path.join(root, ""), partial(os.stat, file))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        # A file system that does not tell kinds, in a folder that may not be searched.
        return False


def _document(
    file: str, path: str, inside: str, facts_of: Callable[..., os.stat_result]
) -> Iterator[Found]:
    """A regular file, or a link to one inside of the root; a dangling link is nothing."""
    try:
        facts = facts_of(follow_symlinks=False)
        linked = stat.S_ISLNK(facts.st_mode)
        if linked:
            file = os.path.realpath(file)
            if not file.startswith(inside):
                return
            facts = os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        # It is there, and nothing else is known; reading it will say why.
        yield Found(file, escape(path), -1, 0, 0)
        return
    if stat.S_ISREG(facts.st_mode):
        times = facts.st_mtime_ns, facts.st_ctime_ns
        yield Found(file, escape(path), facts.st_size, *times, linked)


def read(
    found: Found, namespace: str, *, max_bytes: int, inside: str | Path = "/"
) -> Source | None:
    """Read a document in bounded memory; None when it vanished or is no regular file any more.

    A file of more than `max_bytes` is only hashed. Below `inside` no link is followed. Raises
    OSError when it cannot be read.
    """
    read_ns = time.time_ns()
    try:
        descriptor = _open(found.file, str(inside))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return None
        content, size, sha256 = _content(descriptor, facts.st_size, max_bytes)
    finally:
        os.close(descriptor)
    return Source(
        namespace=namespace,
        path=found.path,
        content=content,
        size=size,
        sha256=sha256,
        modified_ns=facts.st_mtime_ns,
        changed_ns=facts.st_ctime_ns,
        read_ns=read_ns,
    )


def _open(file: str, inside: str) -> int:
    """Open folder by folder: since it was found, one of them may have become a link elsewhere."""
    if not hasattr(os, "O_PATH"):
        return os.open(file, _OPEN_FLAGS)
    root = os.path.join(inside, "")
    within = file[len(root) :] if file.startswith(root) else os.path.relpath(file, inside)
    *folders, name = within.split("/")
    at = os.open(inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(folder, flags, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, _OPEN_FLAGS, dir_fd=at)
    finally:
        os.close(at)


def _content(descriptor: int, size: int, max_bytes: int) -> tuple[bytes, int, str]:
    """The text's share of the file, the number of its bytes and the digest of all of them.

    Not more than `size`: a file that is being written to could grow for ever.
    """
    digest = hashlib.sha256()
    kept: list[bytes] = []
    done = 0
    while done < size:
        chunk = os.read(descriptor, min(size - done, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        if done < TEXT_BYTES and size <= max_bytes:
            kept.append(chunk)
        done += len(chunk)
    return b"".join(kept), done, digest.hexdigest()
