"""A watcher in this process, on a real folder and a real database, for tests."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from msgspec.structs import replace

from helena_cli.database.registry import DocumentRegistry
from helena_cli.documents.names import escape
from helena_cli.documents.watch import Watcher
from helena_cli.runtime import Runtime
from helena_cli.settings import (
    BatchSettings,
    DatabaseSettings,
    DocumentSettings,
    Settings,
    WatchSettings,
)
from tests.hosts import wait_until

HOST = "here"

QUICK = WatchSettings(settle=0.1, max_wait=0.5, grace=0.3, rescan=3600.0, polling_interval=0.2)


class Watching:
    """One watched folder, `docs`, whose documents have the namespace `docs`."""

    def __init__(self, dsn: str, state_dir: Path, folder: Path, admin: str | None = None) -> None:
        self.folder = folder
        self.settings = Settings(
            database=DatabaseSettings(dsn=dsn, connect_timeout=2.0),
            batch=BatchSettings(interval=0.1),
            documents=DocumentSettings(announce="none"),
            watch=QUICK,
            state_dir=state_dir,
        )
        self.admin = psycopg.connect(admin or dsn, autocommit=True)
        self.connections = 0
        self._made: list[tuple[Watcher, Runtime]] = []

    def adjust(self, **watch: Any) -> None:
        """Change settings of the watcher, before it is started."""
        self.settings = replace(self.settings, watch=replace(self.settings.watch, **watch))

    def start(self, *places: Path, looked: bool = True) -> Watcher:
        """Start a watcher, and wait until it has looked at everything."""
        runtime = Runtime(self.settings)

        @contextmanager
        def connect() -> Iterator[DocumentRegistry]:
            self.connections += 1
            with runtime.connection("watch", wait=1.0) as connection:
                yield DocumentRegistry(connection)

        watcher = Watcher(
            places or [self.folder],
            self.settings,
            host=HOST,
            queue=runtime.spool,
            connect=connect,
        )
        self._made.append((watcher, runtime))
        runtime.engine.start()
        watcher.start()
        if looked:
            wait_until(lambda: watcher.state().last_full, "the first look at everything")
        return watcher

    def close(self) -> None:
        for watcher, runtime in reversed(self._made):
            watcher.stop(10.0)
            runtime.close()
        self.admin.close()

    def write(self, path: str, text: str = "") -> Path:
        """Write a document as simple programs do."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text or f"# {path}\n")
        return file

    def rows(self) -> dict[str, tuple[str, bool]]:
        """es_doc_id → sha256 and whether it is marked as missing."""
        query = "SELECT es_doc_id, sha256, metadata ? 'deleted_at' FROM es_document_references"
        return {str(i): (str(sha), bool(gone)) for i, sha, gone in self.admin.execute(query)}

    def table(self) -> dict[str, str]:
        """es_doc_id → sha256 of the documents that are there."""
        return {doc_id: sha for doc_id, (sha, gone) in self.rows().items() if not gone}

    def missing(self) -> set[str]:
        return {doc_id for doc_id, (_, gone) in self.rows().items() if gone}

    def disk(self) -> dict[str, str]:
        """What the table should hold."""
        return {
            f"docs:{escape(file.relative_to(self.folder).as_posix())}": hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
            for file in self.folder.rglob("*.md")
            if file.is_file() and ".git" not in file.parts
        }

    def wait_for_disk(self) -> None:
        """Wait until the table holds what the disk holds."""
        try:
            wait_until(lambda: self.table() == self.disk(), "the table equals the disk")
        except AssertionError:
            table, disk = self.table(), self.disk()
            assert table == disk
