"""Which spool a database has: one, by whatever name the database is called.

A spool is called after host, port and name of its database: before the first contact nothing else
is known. Two files beside it tell more, and each holds the name of a spool:
`ID.target` is the spool of the database with this id in `helena.meta`; `NAME.alias` leads from
another name of that database to it, and repeats the id.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from helena_cli.batch.spool import Spool

log = logging.getLogger(__name__)


def spool_path(own: Path) -> Path:
    """The spool to use where `own` would be the one by name. Raises SpoolError."""
    with suppress(FileNotFoundError):
        known, _, target_id = own.with_suffix(".alias").read_text(encoding="utf-8").partition("\n")
        path = own.parent / known
        # What was queued before the database was known goes by its own spool's position rows.
        if known and _serves(path, target_id) and not (own.exists() and _holds_operations(own)):
            return path
    return own


def learn(used: Path, target_id: str) -> None:
    """On contact: if the database has another spool than the one in use, use that one next."""
    claim = used.parent / f"{target_id}.target"
    try:
        with suppress(FileExistsError):
            _write_new(claim, used.name)
        known = claim.read_text(encoding="utf-8")
        if known == used.name:
            return
        if known and _serves(used.parent / known, target_id):
            _replace(used.with_suffix(".alias"), f"{known}\n{target_id}")
        else:
            # That spool is gone, or became another database's.
            _replace(claim, used.name)
    except OSError as error:
        # Two spools for one database are two flushers, but nothing worse.
        log.warning("%s was not noted: %s", claim, error)


def _serves(path: Path, target_id: str) -> bool:
    """Whether there is a spool at this path that belongs to this database."""
    if not path.is_file():
        return False
    with closing(Spool.open(path)) as spool:
        return spool.target_id == target_id


def _holds_operations(path: Path) -> bool:
    with closing(Spool.open(path)) as spool:
        return spool.queue().total > 0


def _write_new(path: Path, text: str) -> None:
    """Write a file in one step. Raises FileExistsError when it is there."""
    with _beside(path, text) as written:
        os.link(written, path)


def _replace(path: Path, text: str) -> None:
    """Write or replace a file in one step."""
    with _beside(path, text) as written:
        os.replace(written, path)


@contextmanager
def _beside(path: Path, text: str) -> Iterator[Path]:
    written = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_native_id()}")
    try:
        written.write_text(text, encoding="utf-8")
        yield written
    finally:
        written.unlink(missing_ok=True)
