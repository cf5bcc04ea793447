"""A folder of Markdown into the database: a plain loop, and Helena; and an unchanged second run."""

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import frontmatter
import psycopg

from tests.benchmarks import server

WORDS = [
    "index",
    "table",
    "query",
    "lock",
    "batch",
    "queue",
    "writer",
    "reader",
    "page",
    "list",
    "server",
    "agent",
    "report",
]

#: The least that any second run has to do.
SCAN = """
import os, sys
def scan(folder):
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                scan(entry.path)
            else:
                entry.stat(follow_symlinks=False)
scan(sys.argv[1])
"""


def make_documents(folder: Path, count: int) -> None:
    """Notes of about 2 KB with YAML front matter, a hundred to a folder."""
    generator = random.Random(7)
    for n in range(count):
        place = folder / f"part-{n // 100:03}"
        place.mkdir(exist_ok=True)
        text = "\n\n".join(" ".join(generator.choices(WORDS, k=60)) for _ in range(5))
        head = f"---\ntitle: Note {n}\ntags: [a, b{n % 9}]\ndate: 2026-01-{n % 28 + 1:02}\n---\n"
        (place / f"note-{n:05}.md").write_text(f"{head}# Note {n}\n\n{text}\n", encoding="utf-8")


def plain_loop(dsn: str, folder: Path) -> int:
    """Scan, hash, front matter, then COPY and upsert in 500s: what one would write by hand."""
    rows = []
    with psycopg.connect(dsn) as connection:
        for base, _, names in os.walk(folder):
            for name in names:
                path = Path(base, name)
                content = path.read_bytes()
                metadata, text = frontmatter.parse(content.decode())
                document = f"plain:{path.relative_to(folder)}"
                digest = hashlib.sha256(content).hexdigest()
                facts = {"title": metadata.get("title"), "preview": text[:500]}
                tags = metadata.get("tags") or []
                rows.append((document, name, len(content), digest, tags, json.dumps(facts)))
                if len(rows) == 500:
                    _upsert(connection, rows)
                    rows = []
        _upsert(connection, rows)
        found = connection.execute("SELECT count(*) FROM es_document_references").fetchone() or (0,)
    return int(found[0]) if found else 0


def _upsert(connection: psycopg.Connection, rows: Sequence[tuple[object, ...]]) -> None:
    connection.execute(
        "CREATE TEMP TABLE IF NOT EXISTS staged (es_doc_id text, filename text, file_size bigint,"
        " sha256 text, tags text[], metadata jsonb) ON COMMIT DELETE ROWS"
    )
    with connection.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)
    connection.execute(
        "INSERT INTO es_document_references (es_index, es_doc_id, filename, file_size, sha256,"
        " tags, metadata) SELECT 'osint_reports_pdf', * FROM staged"
        " ON CONFLICT (es_doc_id) DO UPDATE SET"
        " filename = EXCLUDED.filename, file_size = EXCLUDED.file_size, sha256 = EXCLUDED.sha256,"
        " tags = EXCLUDED.tags, metadata = EXCLUDED.metadata"
    )
    connection.commit()


def run_helena(dsn: str, state: Path, folder: Path) -> tuple[float, dict[str, int]]:
    """Seconds of `helena process-pending FOLDER` as a whole process, and its document counts."""
    environ = {**os.environ, "HELENA_DSN": dsn, "HELENA_STATE_DIR": str(state)}
    command = [sys.executable, "-m", "helena_cli", "process-pending", "--json", str(folder)]
    started = time.perf_counter()
    answer = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, json.loads(answer.stdout)["documents"]


def run_plain_loop(dsn: str, folder: Path) -> float:
    """Seconds of the plain loop, as a whole process too."""
    code = f"from tests.benchmarks.documents import *; plain_loop({dsn!r}, Path({str(folder)!r}))"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def run_scan(folder: Path) -> float:
    """Seconds of nothing but the names and times of all files, as a whole process too."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", SCAN, folder], check=True)
    return time.perf_counter() - started


def measure(admin: str, count: int, runs: int) -> dict[str, float]:
    """Median seconds: `plain`, `helena` on an empty table, `again` without any change, `scan`."""
    seconds: dict[str, list[float]] = {"plain": [], "helena": [], "again": [], "scan": []}
    with tempfile.TemporaryDirectory(prefix="helena-", dir="/tmp") as name:
        folder = Path(name, "notes")
        folder.mkdir()
        make_documents(folder, count)
        for run in range(runs):
            with server.database(admin) as dsn:
                seconds["plain"].append(run_plain_loop(dsn, folder))
            with server.database(admin) as dsn:
                state = Path(name, f"state-{run}")
                cold, documents = run_helena(dsn, state, folder)
                assert documents["new"] == count, documents
                again, documents = run_helena(dsn, state, folder)
                assert documents["unchanged"] == count, documents
                seconds["helena"].append(cold)
                seconds["again"].append(again)
            seconds["scan"].append(run_scan(folder))
    return {name: statistics.median(values) for name, values in seconds.items()}
