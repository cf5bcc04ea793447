"""Front matter in YAML, TOML or JSON, read by their parsers and made safe to store.

Front matter is input from strangers: it may be broken, no mapping at all, nested ten thousand
levels deep, contain itself, or grow from 200 bytes to megabytes through aliases. Nothing of that
may cost the document its row, the process its memory, or the others their turn.
"""

import base64
import math
import re
import tomllib
from collections.abc import Mapping, Set
from datetime import date, time
from typing import TYPE_CHECKING, Any

import frontmatter
import yaml
from frontmatter.default_handlers import BaseHandler, JSONHandler, YAMLHandler

from helena_cli.documents.block import BOUNDARY, FrontMatter, clean

if TYPE_CHECKING:
    from yaml import SafeLoader as _SafeLoader
else:
    # libyaml's loader is six times as fast, where it was built.
    _SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: A longer block, as text or as JSON, is not kept. Bytes.
MAX_BYTES = 64 * 1024
MAX_DEPTH = 50
#: Keys that `<<` may add to all mappings of a block together, and the mappings that one may merge.
_MAX_MERGED_KEYS = 10_000
_MAX_MERGES = 64
#: Fewer brackets, dashes and question marks than this cannot nest deeply.
_HARMLESS = 200
#: tomllib takes quadratic time over the parts of a dotted key.
_MAX_DOTS = 250

#: What the parsers raise: besides their own errors a bad date gives ValueError, `!!bool maybe`
#: KeyError, `!!int ""` IndexError, `!!timestamp x` AttributeError, deep nesting RecursionError.
_BROKEN = (
    yaml.YAMLError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)


def parse(text: str) -> FrontMatter:
    """Separate front matter and body; without usable front matter the body is the whole text.

    The text has no white space around it.
    """
    handler = frontmatter.detect_format(text, _HANDLERS)
    if handler is None:
        return FrontMatter({}, text)
    try:
        values, body = frontmatter.parse(text, handler=handler)
    except _NotAMapping:
        return FrontMatter({}, text)
    except _BROKEN as error:
        return FrontMatter({}, text, f"front matter: {_describe(error)}")
    fields, problem = _plain_fields(values)
    return FrontMatter(fields, body, problem)


class _NotAMapping(Exception):
    """Prose or a list between two rules: not front matter."""


class _TooDeep(Exception):
    pass


class _TooLarge(Exception):
    pass


class _Loader(_SafeLoader):
    """The safe loader, with a limit on what merge keys may multiply."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merges = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if merges:
            lists = (value for value in merges if isinstance(value, yaml.SequenceNode))
            if len(merges) + sum(len(value.value) for value in lists) > _MAX_MERGES:
                raise yaml.YAMLError("too many merge keys")
        super().flatten_mapping(node)
        if merges:
            self.merged += len(node.value)
            if self.merged > _MAX_MERGED_KEYS:
                raise yaml.YAMLError("the merge keys multiply beyond all measure")


class _Yaml(YAMLHandler):
    """YAML between `---` and `---`, or `...` as some programs end it."""

    FM_BOUNDARY = BOUNDARY

    def detect(self, text: str) -> bool:
        return text.startswith("---") and super().detect(text)

    def load(self, fm: str, **_: object) -> Any:
        _check_size(fm)
        _check_depth(fm)
        return _mapping(yaml.load(fm, Loader=_Loader))


class _Toml(BaseHandler):
    """TOML between `+++` and `+++`, read by Python itself."""

    FM_BOUNDARY = re.compile(r"^\+{3,}[ \t]*$", re.MULTILINE)

    def load(self, fm: str) -> dict[str, Any]:
        _check_size(fm)
        if any(line.count(".") > _MAX_DOTS for line in fm.splitlines()):
            raise ValueError(f"more than {_MAX_DOTS} dots in a line")
        return tomllib.loads(fm)


class _Json(JSONHandler):
    """JSON between a line `{` and a line `}`."""

    def load(self, fm: str, **_: object) -> Any:
        _check_size(fm)
        return _mapping(super().load(fm))


_HANDLERS = (_Yaml(), _Toml(), _Json())


def _check_size(block: str) -> None:
    if len(block) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES // 1024} KiB")


def _check_depth(block: str) -> None:
    """libyaml's composer recurses in C: nesting that is deep enough ends the process."""
    if sum(map(block.count, "[{-?")) < _HARMLESS:
        return
    depth = 0
    for event in yaml.parse(block, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _mapping(value: Any) -> dict[Any, Any]:
    """An empty block is an empty mapping; anything else that is none is somebody's prose."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _NotAMapping
    return value


def _describe(error: BaseException) -> str:
    # The name that libyaml gives to a text helps nobody.
    text = " ".join(str(error).split()).replace(' in "<unicode string>",', " at")
    if isinstance(error, LookupError | AttributeError | RecursionError):
        text = f"{type(error).__name__}: {text}"
    return clean(text[:300])


def _plain_fields(values: Mapping[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """The values as JSON; what does not fit is left out and named."""
    fields: dict[str, Any] = {}
    problem = None
    plain = _Plain(MAX_BYTES)
    for key, value in values.items():
        try:
            name = plain.key(key)
            try:
                fields[name] = plain.value(value, 1)
            except _TooDeep:
                problem = f"front matter: {name[:100]} is nested too deeply, or contains itself"
        except _TooLarge:
            problem = f"front matter: more than {MAX_BYTES // 1024} KiB as JSON, cut off there"
            break
    return fields, problem


class _Plain:
    """Turns values into JSON values, and stops when their size exceeds a budget in bytes."""

    def __init__(self, budget: int) -> None:
        self._left = budget

    def value(self, value: Any, depth: int) -> Any:
        if type(value) is str:
            return self._text(value)
        if isinstance(value, Mapping):
            self._descend(depth)
            return {self.key(key): self.value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            self._descend(depth)
            return [self.value(item, depth + 1) for item in value]
        if isinstance(value, Set):
            self._descend(depth)
            return sorted((self.value(item, depth + 1) for item in value), key=str)
        return self._scalar(value)

    def key(self, key: Any) -> str:
        plain = self._text(key) if type(key) is str else self._scalar(key)
        if plain is None or isinstance(plain, bool):
            return {None: "null", True: "true", False: "false"}[plain]
        return str(plain)

    def _descend(self, depth: int) -> None:
        self._spend(2)
        if depth > MAX_DEPTH:
            raise _TooDeep

    def _text(self, text: str) -> str:
        self._spend(len(text) if text.isascii() else len(text.encode(errors="replace")))
        return clean(text)

    def _scalar(self, value: Any) -> Any:
        self._spend(4)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            # Beyond 64 bits most readers of JSON lose digits; str() refuses very long numbers.
            if value.bit_length() < 64:
                return value
            return self._text(str(value) if value.bit_length() < 4096 else hex(value))
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, date | time):
            return value.isoformat()
        if isinstance(value, bytes):
            return self._text(base64.b64encode(value).decode())
        return self._text(str(value))

    def _spend(self, size: int) -> None:
        self._left -= size + 2
        if self._left < 0:
            raise _TooLarge
