"""Names of files as text that PostgreSQL accepts, and back."""

import re

_UNREADABLE_TEXT = re.compile("[\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4}))")


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
