"""Which paths of a root are documents: by extension, and by patterns in gitignore syntax."""

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pathspec

from helena_cli.errors import ConfigurationError
from helena_cli.settings import DocumentSettings

IGNORE_FILE = ".helenaignore"

#: What the old programs leave behind is no document, wherever it lies.
PENDING = ("helena_batch_pending/", "helena_tasks/", "**/sql/realtime_updates/")

#: What a star of gitignore becomes; each "any folders" multiplies the time by their number.
_STAR = "[^/]*"
_MAX_DOUBLE_STARS = 2


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
