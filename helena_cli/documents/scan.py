"""Finding the documents of a folder, and reading one of them.

Nothing but regular files is ever opened, nothing outside of the root is ever read, and what is
ignored is not even walked.
"""

import hashlib
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pathspec
from msgspec import Struct

from helena_cli.documents.extract import TEXT_BYTES, Source
from helena_cli.errors import ConfigurationError
from helena_cli.settings import DocumentSettings

IGNORE_FILE = ".helenaignore"

#: What the old programs leave behind is no document, wherever it lies.
PENDING = ("helena_batch_pending/", "helena_tasks/", "**/sql/realtime_updates/")

#: What a star of gitignore becomes; each "any folders" multiplies the time by their number.
_STAR = "[^/]*"
_MAX_DOUBLE_STARS = 2

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
_UNREADABLE_TEXT = re.compile("[\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4}))")


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


def escape(name: str) -> str:
    """A file name as text that PostgreSQL accepts; no two names become the same text.

    A byte that is not UTF-8 becomes `\\xNN`, and so does the backslash itself.
    """
    if name.isascii() and "\\" not in name:
        return name
    return _UNREADABLE_TEXT.sub(_escape_character, name)


def unescape(text: str) -> str:
    """The file name that `escape` was given."""
    return _ESCAPE.sub(_unescape_character, text)


def _escape_character(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code == ord("\\"):
        return r"\x5c"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}"


def _unescape_character(match: re.Match[str]) -> str:
    byte, character = match.groups()
    if character:
        return chr(int(character, 16))
    code = int(byte, 16)
    return chr(code if code < 0x80 else 0xDC00 + code)


class Filter:
    """Which paths of a root are documents: the extensions, and what is to be ignored."""

    def __init__(self, root: Path, settings: DocumentSettings) -> None:
        """Raises ConfigurationError for a pattern that is none, or an ignore file that cannot be
        read: what it hides must not be published by accident."""
        self._extensions = tuple(extension.lower() for extension in settings.extensions)
        configured, own = (*PENDING, *settings.ignore), _ignore_lines(root)
        with warnings.catch_warnings():
            # That `[[a]` may mean something else to Python some day is nothing to tell a person.
            warnings.simplefilter("ignore", FutureWarning)
            _check_patterns(configured, "[documents] ignore")
            _check_patterns(own, str(root / IGNORE_FILE))
            self._ignored = _compiled([*configured, *own])
            self._suspected = _any_of(self._ignored)

    def is_document(self, name: str) -> bool:
        """Whether a file of this name would be indexed."""
        return name.lower().endswith(self._extensions)

    def ignores(self, path: str) -> bool:
        """Whether this relative path is ignored; a folder ends with a slash."""
        if not path.isascii():
            # The engine that matches may want valid text.
            path = os.fsencode(path).decode(errors="backslashreplace")
        if self._suspected.search(path) is None:
            return False
        return self._ignored.match_file(path)

    def ignores_any_part(self, path: str) -> bool:
        """Whether a file or folder, or any folder above it, is ignored."""
        parts = path.split("/")
        folders = ("/".join(parts[:end]) + "/" for end in range(1, len(parts)))
        return any(self.ignores(path) for path in (*folders, path, f"{path}/"))


def _ignore_lines(root: Path) -> Sequence[str]:
    try:
        content = (root / IGNORE_FILE).read_bytes() if os.path.isfile(root / IGNORE_FILE) else b""
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{root / IGNORE_FILE} cannot be read: {error}.",
            remedy="Make it readable, as UTF-8, so that what it hides stays hidden.",
        ) from error
    return [line.rstrip("\r") for line in text.split("\n")]


def _check_patterns(lines: Sequence[str], place: str) -> None:
    for number, line in enumerate(lines, 1):
        try:
            _compiled([line])
        except (ValueError, re.error, OverflowError) as error:
            raise ConfigurationError(
                f"{place}: pattern {number}, {line!r}, is not a gitignore pattern: {error}.",
                remedy="Mend or remove it; the syntax is that of .gitignore.",
            ) from error


def _compiled(lines: Sequence[str]) -> pathspec.GitIgnoreSpec:
    """Patterns that no path keeps busy for long. Raises ValueError, re.error, OverflowError."""
    spec = pathspec.GitIgnoreSpec.from_lines(lines)
    for pattern in spec.patterns:
        if isinstance(pattern, pathspec.RegexPattern) and pattern.regex is not None:
            # The engine that matches, when it is Python's own, reads it anew each time.
            pattern.regex = re.compile(_without_retries(str(pattern.regex.pattern)))
    return spec


def _any_of(spec: pathspec.GitIgnoreSpec) -> re.Pattern[str]:
    """What matches whatever one of the patterns matches, in a single look: most paths no one does.

    Only the patterns themselves can tell what that means.
    """
    regexes = (
        # A name may be given to one group only.
        re.sub(r"\(\?P<\w+>", "(?:", str(pattern.regex.pattern))
        for pattern in spec.patterns
        if isinstance(pattern, pathspec.RegexPattern) and pattern.regex is not None
    )
    return re.compile("|".join(f"(?:{regex})" for regex in regexes))


def _without_retries(regex: str) -> str:
    """The same, but a star that is followed by another one in its part of the path stays where it
    fitted first: to move it could not help the next one, and tried in vain takes for ever."""
    if regex.count(".+") > _MAX_DOUBLE_STARS:
        raise ValueError(f"it goes through more than {_MAX_DOUBLE_STARS} times any folders")
    first, *pieces = regex.split(_STAR)
    for at, piece in enumerate(pieces[:-1]):
        within = "/" not in piece.replace("[^/]", "")
        pieces[at] = f"(?>{_STAR}?{piece})" if within else _STAR + piece
    return first + "".join(pieces[:-1]) + "".join(_STAR + piece for piece in pieces[-1:])


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
