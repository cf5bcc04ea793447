"""Settings: frozen, checked, and each with the place it came from.

Defaults < configuration file < environment < options of the command line. This is the only module
that reads `os.environ`.
"""

import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import platformdirs

from helena_cli.errors import ConfigurationError, UsageError
from helena_cli.settings import (
    SECTIONS,
    PendingSettings,
    Rules,
    Settings,
)

#: For whoever does not know what to write; an installed package comes without the example file.
_EXAMPLE = "helena init --write-config --config NEW.toml writes a file with every key explained."


def load(
    *,
    file: Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Merge all sources into one `Settings`.

    `file` is the one named on the command line; `options` are the values given there, as
    {section: {key: value}}. Raises ConfigurationError for a file that cannot be read and for any
    key or value that does not fit, UsageError for a password on the command line.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins: dict[str, str] = {}
    config_file = _find_file(file, environ)
    sources = [
        *(_from_file(config_file) if config_file else ()),
        *_from_environment(environ),
        *_from_options(options or {}),
    ]
    for section, key, value, origin in sources:
        values[section][key] = value
        origins[f"{section}.{key}"] = origin
    dsn, dsn_origin = _choose_dsn(values["database"], origins.get("database.dsn"), environ)
    values["database"]["dsn"] = dsn
    if dsn_origin:
        origins["database.dsn"] = dsn_origin
    values["documents"].update(_absolute_roots(values["documents"], origins, config_file))
    values["pending"].update(_absolute_pending(values["pending"], origins, config_file))
    sections: dict[str, Any] = {name: kind(**values[name]) for name, kind in SECTIONS.items()}
    settings = Settings(
        **sections,
        state_dir=_state_dir(environ),
        config_file=config_file,
        origins=origins,
    )
    _check(settings)
    return settings


Source = tuple[str, str, Any, str]


def _find_file(named: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The first configuration file: the one named must exist, the usual places need not."""
    if named is None and environ.get("HELENA_CONFIG"):
        named = _at_home(environ["HELENA_CONFIG"], "HELENA_CONFIG")
    if named is not None:
        return named.absolute()
    usual = (Path("helena.toml"), platformdirs.user_config_path("helena") / "helena.toml")
    # Not Path.is_file, which raises in a folder that this user may not enter.
    return next((path.absolute() for path in usual if os.path.isfile(path)), None)


def file_to_write(named: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a new configuration file goes, so that the next command in this folder reads it."""
    path = named or _at_home(environ.get("HELENA_CONFIG") or "helena.toml", "HELENA_CONFIG")
    return path.absolute()


def _from_file(path: Path) -> Iterator[Source]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"The configuration file {path} cannot be read: {error.strerror}.",
            remedy="Check --config and HELENA_CONFIG, or write one: helena init --write-config.",
        ) from error
    # A number of five thousand digits is a ValueError of another kind.
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is not valid TOML: {error}.",
            remedy=f"Mend that line. {_EXAMPLE}",
        ) from error
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigurationError(
                f"{path}: the key {section!r} stands outside every section.",
                remedy=f"Move it below one of {_sections()}.",
            )
        if section not in SECTIONS:
            raise ConfigurationError(
                f"{path}: there is no section [{section}].",
                remedy=f"Known sections: {_sections()}.{_meant(section, SECTIONS)}",
            )
        for key, value in table.items():
            yield section, key, _convert(section, key, value, f"{path}"), str(path)


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in SECTIONS)


def _meant(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _from_environment(environ: Mapping[str, str]) -> Iterator[Source]:
    for name, text in environ.items():
        section, _, key = name.removeprefix("HELENA_").lower().partition("_")
        if name.startswith("HELENA_") and section in SECTIONS and key:
            value = _convert(section, key, text, f"the environment variable {name}", text=True)
            yield section, key, value, name
    if environ.get("HELENA_DSN"):
        yield "database", "dsn", environ["HELENA_DSN"], "HELENA_DSN"


def _from_options(options: Mapping[str, Mapping[str, Any]]) -> Iterator[Source]:
    for section, table in options.items():
        for key, value in table.items():
            if value is None:
                continue
            if key == "dsn":
                check_dsn_option(value)
            option = f"--{key.replace('_', '-')}"
            yield section, key, _convert(section, key, value, f"the option {option}"), option


def check_dsn_option(dsn: str) -> None:
    """Refuse what must not stand on a command line. Raises UsageError."""
    if has_password(dsn):
        raise UsageError(
            "A password on the command line can be read by every user of this machine.",
            remedy="Put the whole DSN into HELENA_DSN, or the password into ~/.pgpass.",
        )
    if not dsn.strip():
        # `--dsn "$UNSET"` must not fall through to some other database.
        raise UsageError(
            "The option --dsn is empty.",
            remedy="Give a DSN, or leave the option out to use the configured database.",
        )


def _convert(section: str, key: str, value: Any, origin: str, *, text: bool = False) -> Any:
    """Check one value against its field; `text` values come from the environment."""
    fields = {field.name: field for field in msgspec.structs.fields(SECTIONS[section])}
    if key not in fields:
        raise ConfigurationError(
            f"{origin}: [{section}] has no key {key!r}.",
            remedy=f"Known keys of [{section}]: {', '.join(fields)}.{_meant(key, fields)}",
        )
    kind = fields[key].type
    if any("\0" in part for part in _texts(value)):
        raise ConfigurationError(
            f"{origin}: [{section}] {key} contains a NUL character.",
            remedy="Remove it: no path, name or address may have one.",
        )
    try:
        if text and key == "rules":
            return msgspec.json.decode(value, type=Rules)
        if text and isinstance(fields[key].default, tuple):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return msgspec.convert(value, kind, strict=not text)
    # A variable may hold bytes that are no text.
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        # A DSN is never repeated: it may hold a password.
        shown = "" if key.endswith("dsn") else f" = {_shorten(value)}"
        raise ConfigurationError(
            f"{origin}: [{section}] {key}{shown}: {_plainly(str(error))}.",
            remedy=_EXAMPLE,
        ) from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, (*value.keys(), *value.values())))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "array": "a list",
    "object": "a table",
    "bool": "true or false",
    "null": "nothing",
}


def _plainly(complaint: str) -> str:
    """msgspec's complaint in the words of a person who writes TOML."""
    named = re.sub(
        r"`([^`$]+)`",
        lambda match: " or ".join(_WORDS.get(word, repr(word)) for word in match[1].split(" | ")),
        complaint,
    )
    return re.sub(r" - at `\$\.?(.+)`$", r", at \1", named[:1].lower() + named[1:])


def _shorten(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except ValueError:
        # Python prints no number of five thousand digits.
        return "…"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _absolute_roots(
    documents: Mapping[str, Any], origins: Mapping[str, str], config_file: Path | None
) -> dict[str, tuple[str, ...]]:
    if "roots" not in documents:
        return {}
    base = _base(origins["documents.roots"], config_file)
    origin = origins["documents.roots"]
    return {"roots": tuple(_absolute(root, base, origin) for root in documents["roots"])}


def _absolute_pending(
    pending: Mapping[str, Any], origins: Mapping[str, str], config_file: Path | None
) -> dict[str, str]:
    defaults = PendingSettings()
    return {
        key: _absolute(
            pending.get(key, getattr(defaults, key)),
            _base(origins.get(f"pending.{key}", str(config_file)), config_file),
            origins.get(f"pending.{key}", "the default"),
        )
        for key in ("operations", "tasks", "backlog")
    }


def _base(origin: str, config_file: Path | None) -> Path:
    """Folders named in the file are relative to its own, all others to the current one."""
    return config_file.parent if config_file is not None and origin == str(config_file) else Path()


def _absolute(path: str, base: Path, origin: str) -> str:
    return os.path.abspath(base / _at_home(path, origin))


def _at_home(path: str, origin: str) -> Path:
    """The path with ~ and ~name replaced. Raises ConfigurationError for an unknown name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"{path!r} (from {origin}) begins with the home directory of an unknown user.",
            remedy="Write the whole path.",
        ) from error


def _choose_dsn(
    database: Mapping[str, Any], origin: str | None, environ: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """--dsn > HELENA_DSN > [database] dsn > DATABASE_URL > libpq's variables > the embedded one."""
    if database.get("dsn"):
        return str(database["dsn"]), origin
    if environ.get("DATABASE_URL"):
        return environ["DATABASE_URL"], "DATABASE_URL"
    libpq = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE", "PGPORT", "PGUSER")
    used = [name for name in libpq if environ.get(name)]
    return ("", used[0]) if used else (None, None)


def _state_dir(environ: Mapping[str, str]) -> Path:
    named = environ.get("HELENA_STATE_DIR")
    if named:
        return _at_home(named, "HELENA_STATE_DIR").absolute()
    return platformdirs.user_state_path("helena").absolute()


def take(*names: str, environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Take variables out of the environment: what they tell is not meant for our children."""
    return {name: environ.pop(name) for name in names if name in environ}


def service_variables(
    settings: Settings, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What a service, which starts without our environment, needs of it to mean the same.

    Raises ConfigurationError for a password: a service's file is no place for one.
    """
    used = {origin for origin in settings.origins.values() if origin in environ}
    if settings.database.dsn is not None:
        used |= {name for name in environ if re.fullmatch("PG[A-Z]+", name)}
    secret = [name for name in sorted(used) if name == "PGPASSWORD" or has_password(environ[name])]
    if secret:
        raise ConfigurationError(
            f"{secret[0]} holds a password, which would be written into the file of the service.",
            remedy="Put the password into ~/.pgpass, or the DSN into [database] dsn of a "
            "configuration file that only you can read, and unset the variable.",
        )
    return {
        **{name: environ[name] for name in sorted(used)},
        # Always: the service must find the queue of the scripts, whatever XDG_STATE_HOME says.
        "HELENA_STATE_DIR": str(settings.state_dir),
    }


def _check(settings: Settings) -> None:
    """What concerns more than one key, and the patterns."""
    if settings.batch.size > settings.batch.max_size:
        raise ConfigurationError(
            f"[batch] size ({settings.batch.size}, from {settings.origin('batch.size')}) is larger "
            f"than max_size ({settings.batch.max_size}).",
            remedy="Raise max_size or lower size.",
        )
    for extension in settings.documents.extensions:
        if not re.fullmatch(r"\.[^/\\]+", extension):
            raise ConfigurationError(
                f"[documents] extensions: {extension!r} (from "
                f"{settings.origin('documents.extensions')}) does not begin with a dot.",
                remedy='Write it like ".md".',
            )
    for table in settings.pending.tables:
        if not re.fullmatch(r"[^.\s][^.]*(\.[^.\s][^.]*)?", table):
            raise ConfigurationError(
                f"[pending] tables: {table!r} (from {settings.origin('pending.tables')}) is "
                "neither a table's name nor schema.name.",
                remedy='Write it like "notes" or "archive.notes".',
            )
    for place, pattern in _patterns(settings.documents.rules):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigurationError(
                f"[documents.rules] {place}: {pattern!r} is not a regular expression: {error}.",
                remedy="Mend the pattern; it follows Python's re syntax.",
            ) from error


def _patterns(rules: Rules) -> Iterator[tuple[str, str]]:
    for rule in rules.types:
        yield from (("types", pattern) for pattern in (rule.name, *rule.content) if pattern)
    yield from (("tags", rule.content) for rule in rules.tags if rule.content)
    yield from (("investigations", rule.path) for rule in rules.investigations)
    yield from (("classifications", rule.path) for rule in rules.classifications)


def has_password(dsn: str) -> bool:
    """Whether a DSN, as a URI or as key=value pairs, carries a password of any kind."""
    scheme, uri, rest = dsn.partition("://")
    if not uri or "=" in scheme:
        return bool(re.search(r"(?i)(?:\b(?:ssl)?password|_secret|scram_\w+_key)\s*=", dsn))
    # libpq reads "user:password@" up to the first "@", and a password may hold "#" and "?", where
    # urlsplit would end the host. The port of "host:5432/db?…" is no password.
    if re.match(r"[^@/]*:[^@/]+@", rest) or re.match(r"[^@/]*:(?!\d*/)[^@]+@", rest):
        return True
    _, _, query = rest.partition("?")
    keys = [key.lower() for key, _ in parse_qsl(query, keep_blank_values=True)]
    return any(re.search("password|_secret|scram_.+_key", key) for key in keys)
