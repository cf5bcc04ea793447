"""The program as a person, a script or cron meets it: what it prints, and how it ends."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import helena_cli
from helena_cli.batch.flush import Waiting
from helena_cli.batch.spool import Spool
from helena_cli.batch.verdict import Verdict
from helena_cli.database import embedded
from tests.cluster import Cluster

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

PROJECT = Path(helena_cli.__file__).parent.parent
AWAY = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=2"

Result = subprocess.CompletedProcess[str]
Helena = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to run in: no configuration lies there."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def variables(folder: Path, state_dir: Path, dsn: str | None = None) -> dict[str, str]:
    """The whole environment of a command."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(PROJECT),
        "PYTHONWARNINGS": "error",
        "HELENA_STATE_DIR": str(state_dir),
        **({"HELENA_DSN": dsn} if dsn is not None else {}),
    }


def run(arguments: Sequence[str], folder: Path, environ: Mapping[str, str]) -> Result:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environ,
        input="y\n",
        timeout=60,
    )


@pytest.fixture
def helena(folder: Path, state_dir: Path) -> Helena:
    """Runs the program with nothing but what is given; `before` is a program that runs it."""

    def call(
        *arguments: str,
        dsn: str | None = None,
        environ: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Result:
        program = [*before, sys.executable, "-m", "helena_cli", *arguments]
        return run(program, folder, {**variables(folder, state_dir, dsn), **(environ or {})})

    return call


def answer(result: Result, code: int = 0) -> Any:
    """The one JSON document on stdout."""
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def complaint(result: Result, code: int) -> str:
    """What a failed command says on stderr: no result, a remedy, and no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "what to do:" in result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def spool_in(state_dir: Path) -> Spool:
    (path,) = state_dir.glob("*.spool")
    return Spool.open(path)


@pytest.fixture
def queued(helena: Helena, helena_dsn: str, state_dir: Path) -> Path:
    """Three dead letters and one operation of a waiting table; returns the state directory."""
    assert helena("status", dsn=helena_dsn).returncode == 0
    spool = spool_in(state_dir)
    rows = [{"id": f"m{n}", "sender": "a", "message_type": "b", "content": "c"} for n in range(3)]
    ids = spool.extend([("insert", "messages", row) for row in rows])
    spool.bury([Verdict(identifier, "23502", "[/x] no \x1b[2J value") for identifier in ids])
    spool.append("insert", "nowhere", {"id": 1})
    spool.wait("nowhere", Waiting("there is no such table", "42P01", "Create it."), 1000.0)
    spool.close()
    return state_dir


@pytest.fixture
def tree(folder: Path) -> Path:
    """Three documents, one of them with broken front matter."""
    docs = folder / "docs"
    (docs / "sub").mkdir(parents=True)
    (docs / "one.md").write_text("# One\n")
    (docs / "sub" / "two.md").write_text("---\ntitle: Two\ntags: [x]\n---\ntext\n")
    (docs / "bad.md").write_text("---\ntitle: [\n---\ntext\n")
    return docs


def count(dsn: str, query: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


DOCUMENTS = "SELECT count(*) FROM es_document_references"

# Help, versions and wrong usage


def test_help_comes_quickly_and_without_the_libraries(folder: Path, state_dir: Path):
    script = "import sys; from helena_cli.cli import run; run(['--help']); print(*sys.modules)"
    result = run([sys.executable, "-c", script], folder, variables(folder, state_dir))
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "process-pending" in result.stdout
    assert loaded & {"psycopg", "msgspec", "rich", "rich.console", "watchdog", "psutil"} == set()


@pytest.mark.parametrize("arguments", [("--version",), ("status", "--version")])
def test_the_version_is_told_anywhere(helena: Helena, arguments: tuple[str, ...]):
    result = helena(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith("helena")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("status", "--jsn"), "No such option"),
        (("statsu",), "Did you mean 'status'"),
        (("dead-letters", "show", "x"), "Invalid value"),
        (("init", "--print", "--write-config"), "are different things"),
        (("dead-letters", "drop"), "not clear which"),
        (("dead-letters", "drop", "--all", "7"), "not clear which"),
        (("process-pending", ""), "A PATH is empty"),
        (("process-pending", "--prune"), "does not know where"),
        (("status", "--dsn", ""), "--dsn is empty"),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_wrong(
    helena: Helena, arguments: tuple[str, ...], says: str
):
    result = helena(*arguments, dsn=AWAY)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr


def test_a_password_on_the_command_line_is_refused_and_not_repeated(helena: Helena):
    said = complaint(helena("status", "--dsn", "postgresql://u:secret@h/d"), 2)
    assert "HELENA_DSN" in said
    assert "secret" not in said


# Configuration


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_an_unknown_key_is_3_and_names_file_section_and_key(
    helena: Helena, folder: Path, json_too: tuple[str, ...]
):
    (folder / "helena.toml").write_text("[batch]\nsise = 1\n")
    said = complaint(helena("status", *json_too, dsn=AWAY), 3)
    assert f"{folder}/helena.toml: [batch] has no key 'sise'" in said
    assert "Did you mean 'size'?" in said


@pytest.mark.skipif(not embedded.available(), reason="needs the absence to be simulated")
def test_no_database_at_all_is_3_and_says_how_to_get_one(folder: Path, state_dir: Path):
    script = (
        "import sys; from helena_cli.database import embedded; embedded.available = lambda: False;"
        "from helena_cli.cli import run; sys.exit(run(['status']))"
    )
    result = run([sys.executable, "-c", script], folder, variables(folder, state_dir))
    said = complaint(result, 3)
    assert "HELENA_DSN" in said
    assert "helena-cli[embedded]" in said


def without_roots_rights(folder: Path) -> list[str]:
    """The program that takes away what lets root write everywhere; nothing for another user."""
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("As root this needs setpriv.")
    entry = pwd.getpwnam("nobody")
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    dropped = "-dac_override,-dac_read_search"
    return [setpriv, "--bounding-set", dropped, "--inh-caps", dropped]


def test_a_state_directory_that_cannot_be_written_is_3(helena: Helena, tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    before = without_roots_rights(closed)
    environ = {"HELENA_STATE_DIR": str(closed / "state"), "HELENA_DSN": AWAY}
    said = complaint(helena("status", environ=environ, before=before), 3)
    assert "HELENA_STATE_DIR" in said
    assert str(closed) in said


def test_a_configuration_file_is_written_once_and_is_valid(
    helena: Helena, folder: Path, helena_dsn: str
):
    address = make_conninfo(helena_dsn)
    assert helena("init", "--write-config", "--dsn", address).returncode == 0
    path = folder / "helena.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert helena("status").returncode == 0
    said = complaint(helena("init", "--write-config"), 3)
    assert "exists already" in said


# The database away


def test_status_answers_for_the_queue_when_the_database_is_away(helena: Helena):
    document = answer(helena("status", "--json", dsn=AWAY), 4)
    assert document["queue"]["total"] == 0
    assert document["database"]["reachable"] is False
    assert "refused" in document["database"]["reason"]
    checks = {check["name"]: check["status"] for check in document["checks"]}
    assert checks["response_time"] == "critical"
    assert checks["longest_query"] == "unknown"


def test_status_for_a_person_says_what_to_do_when_the_database_is_away(helena: Helena):
    result = helena("status", dsn=AWAY)
    assert result.returncode == 4
    assert "What to do" in result.stdout
    assert "start PostgreSQL" in result.stdout
    assert "Queue" in result.stdout


def test_process_pending_without_a_database_keeps_the_queue_and_says_where(
    helena: Helena, state_dir: Path, tree: Path
):
    helena("status", dsn=AWAY)
    spool = spool_in(state_dir)
    spool.append("insert", "messages", {"id": "a"})
    spool.close()
    result = helena("process-pending", "--json", str(tree), dsn=AWAY)
    assert answer(result, 4)["operations"]["remaining"] == 1
    assert f"1 operation, in {state_dir}" in result.stderr
    assert "what to do:" in result.stderr


def test_a_wrong_password_is_4_and_never_shown(helena: Helena, own_server: Cluster):
    own_server.start()
    dsn = make_conninfo(own_server.tcp_dsn, password="opensesame")
    for command in ("init", "process-pending", "status"):
        result = helena(command, dsn=dsn)
        assert result.returncode == 4
        assert "~/.pgpass" in result.stdout + result.stderr
        assert "opensesame" not in result.stdout + result.stderr


def test_a_traceback_comes_only_with_v(helena: Helena):
    assert "Traceback" not in helena("init", dsn=AWAY).stderr
    result = helena("init", "-v", dsn=AWAY)
    assert (result.returncode, result.stdout) == (4, "")
    assert "Traceback" in result.stderr


# init


def test_init_can_be_repeated(helena: Helena, dsn: str):
    first = answer(helena("init", "--json", dsn=dsn))
    assert "table messages" in first["created"]
    assert answer(helena("init", "--json", dsn=dsn))["created"] == []
    assert "Nothing to do" in helena("init", dsn=dsn).stdout
    assert answer(helena("status", "--json", dsn=dsn))["database"]["prepared"] is True


@pytest.mark.skipif(shutil.which("psql") is None, reason="needs psql")
def test_the_printed_sql_is_all_that_psql_needs(helena: Helena, dsn: str):
    script = helena("init", "--print")
    assert script.returncode == 0
    psql = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", dsn]
    subprocess.run(psql, input=script.stdout, text=True, check=True, capture_output=True)
    assert answer(helena("init", "--json", dsn=dsn))["created"] == []


def test_a_database_without_helenas_tables_is_3(helena: Helena, dsn: str, tree: Path):
    for arguments in (("process-pending",), ("process-pending", "--json", str(tree))):
        assert "helena init" in complaint(helena(*arguments, dsn=dsn), 3)
    assert "helena init" in helena("status", dsn=dsn).stdout


def test_a_restored_spool_starts_again_and_keeps_what_was_queued_as_dead_letters(
    helena: Helena, queued: Path, helena_dsn: str
):
    spool = spool_in(queued)
    before = spool.id
    spool.close()
    refused = helena("init", "--new-spool", dsn=helena_dsn)
    assert (refused.returncode, refused.stdout) == (5, "")
    assert "1 queued operation" in refused.stderr
    done = helena("init", "--new-spool", "--yes", "--json", dsn=helena_dsn)
    assert answer(done) == {"dead_letters": 1}
    spool = spool_in(queued)
    assert spool.id != before
    assert (spool.queue().total, spool.queue().dead_letters) == (0, 4)
    spool.close()
    again = helena("init", "--new-spool", dsn=helena_dsn)
    assert again.returncode == 0
    # Nothing was queued, and nobody has found a copy.
    assert "dead-letters list" not in again.stderr
    assert "--new-spool" in again.stderr


# status


def test_status_has_all_the_keys_that_programs_rely_on(
    helena: Helena, queued: Path, helena_dsn: str
):
    document = answer(helena("status", "--json", dsn=helena_dsn))
    assert document.keys() >= {
        *("queue", "flusher", "flushes", "database", "lanes", "hosts", "other_spools", "checks")
    }
    queue = document["queue"]
    assert (queue["insert"], queue["update"], queue["message"], queue["total"]) == (1, 0, 0, 1)
    assert queue["oldest_seconds"] >= 0
    assert queue["dead_letters"] == 3
    assert queue["spool_bytes"] > 0
    assert document["flusher"].keys() >= {"running", "pid", "since"}
    assert document["flushes"].keys() >= {
        *("count", "operations", "rows", "failures", "operations_per_second"),
        *("p50_ms", "p99_ms", "last"),
    }
    assert document["database"].keys() >= {
        *("target", "reachable", "response_ms", "active_queries", "longest_query_seconds"),
        *("lock_waits", "idle_in_transaction", "connections", "gin", "tables"),
    }
    assert document["database"]["connections"].keys() >= {"used", "max", "helena"}
    assert document["database"]["gin"][0].keys() >= {
        *("index", "table", "pending_pages", "limit_pages")
    }
    (lane,) = document["lanes"]
    assert (lane["table"], lane["operations"]) == ("nowhere", 1)
    assert lane["reason"] == "there is no such table"
    assert lane["since"]
    for check in document["checks"]:
        assert check.keys() >= {"name", "status", "value", "limit", "message", "remedy"}
        assert check["status"] in {"ok", "warn", "critical", "unknown"}


def test_a_queue_that_grows_old_makes_check_fail(helena: Helena, state_dir: Path, helena_dsn: str):
    helena("status", dsn=helena_dsn)
    (path,) = state_dir.glob("*.spool")
    spool = Spool.open(path, clock=lambda: 1_000_000.0)
    spool.append("insert", "messages", {"id": "old"})
    spool.close()
    assert helena("status", dsn=helena_dsn).returncode == 0
    result = helena("status", "--check", dsn=helena_dsn)
    assert result.returncode == 1
    assert "critical" in result.stdout


def test_output_on_a_pipe_is_plain_and_complete(helena: Helena, queued: Path, helena_dsn: str):
    for arguments in (("status",), ("dead-letters", "list")):
        for environ in ({}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}):
            result = helena(*arguments, environ={"HELENA_DSN": helena_dsn, **environ})
            assert result.returncode == 0
            assert "\x1b" not in result.stdout
            assert "…" not in result.stdout
            assert not any(line.endswith(" ") for line in result.stdout.splitlines())


@pytest.mark.parametrize("arguments", [("status",), ("status", "--json"), ("--help",)])
def test_a_reader_that_has_gone_away_is_told_nothing(
    folder: Path, state_dir: Path, helena_dsn: str, arguments: tuple[str, ...]
):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "helena_cli", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=variables(folder, state_dir, helena_dsn),
        timeout=60,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


# Dead letters


def letters(helena: Helena, dsn: str, *arguments: str) -> list[dict[str, Any]]:
    found = answer(helena("dead-letters", "list", "--json", *arguments, dsn=dsn))
    assert found.keys() == {"dead_letters"}
    return list(found["dead_letters"])


def test_dead_letters_are_listed_shown_retried_and_dropped(
    helena: Helena, queued: Path, helena_dsn: str
):
    first, second, third = letters(helena, helena_dsn)
    assert first.keys() >= {
        *("id", "kind", "table", "data", "sqlstate", "message", "attempts", "failed_at")
    }
    assert first["data"]["id"] == "m0"
    assert letters(helena, helena_dsn, "--table", "other") == []
    shown = helena("dead-letters", "show", str(first["id"]), dsn=helena_dsn)
    assert '"m0"' in shown.stdout
    assert "23502" in shown.stdout
    assert "\x1b" not in shown.stdout

    retried = answer(helena("dead-letters", "retry", str(first["id"]), "--json", dsn=helena_dsn))
    assert retried["retried"] == 1
    refused = helena("dead-letters", "drop", str(second["id"]), dsn=helena_dsn)
    assert refused.returncode == 5
    assert str(second["id"]) in refused.stdout
    plan = answer(helena("dead-letters", "drop", "--all", "--json", dsn=helena_dsn), 5)
    assert (len(plan["dead_letters"]), plan["dropped"]) == (2, 0)
    assert len(letters(helena, helena_dsn)) == 2
    dropped = helena("dead-letters", "drop", str(second["id"]), "--yes", dsn=helena_dsn)
    assert dropped.returncode == 0
    assert [letter["id"] for letter in letters(helena, helena_dsn)] == [third["id"]]

    assert answer(helena("dead-letters", "drop", "--table", "none", "--json", dsn=helena_dsn)) == {
        "dead_letters": [],
        "dropped": 0,
    }

    result = helena("process-pending", "--json", dsn=helena_dsn)
    assert answer(result)["operations"] == {
        **{"accepted": 0, "written": 1, "coalesced": 0, "dead": 0, "remaining": 1}
    }
    assert count(helena_dsn, "SELECT count(*) FROM messages WHERE id = 'm0'") == 1
    drop_table = helena("dead-letters", "drop", "--table", "messages", "-y", dsn=helena_dsn)
    assert "1 dead letter deleted" in drop_table.stdout
    assert "no dead letters" in helena("dead-letters", "list", dsn=helena_dsn).stderr


def test_a_dead_letter_that_is_not_there_is_named(helena: Helena, queued: Path, helena_dsn: str):
    known = letters(helena, helena_dsn)[0]["id"]
    for verb in ("show", "retry", "drop"):
        said = complaint(helena("dead-letters", verb, "7", str(known), dsn=helena_dsn), 2)
        assert "no dead letter 7" in said
    assert len(letters(helena, helena_dsn)) == 3


# process-pending

SAME = {"found": 3, "new": 0, "changed": 0, "unchanged": 3, "missing": 0, "failed": 0}


def test_a_second_run_over_the_same_tree_changes_nothing(
    helena: Helena, helena_dsn: str, tree: Path
):
    first = answer(helena("process-pending", str(tree), "--json", dsn=helena_dsn))
    assert first["documents"] == {**SAME, "new": 3, "unchanged": 0}
    assert first["operations"]["accepted"] == first["operations"]["written"] > 0
    assert first["operations"]["remaining"] == 0
    assert first["flushes"] >= 1
    assert [Path(one["path"]).name for one in first["failures"]] == ["bad.md"]
    assert first.keys() >= {"operation_files", "backlog", "seconds"}
    assert count(helena_dsn, DOCUMENTS) == 3

    second = answer(helena("process-pending", str(tree), "--json", dsn=helena_dsn))
    assert second["documents"] == SAME
    nothing = {"accepted": 0, "written": 0, "coalesced": 0, "dead": 0, "remaining": 0}
    assert (second["operations"], second["flushes"]) == (nothing, 0)


def test_the_result_for_a_person_lists_every_failure_in_full(
    helena: Helena, helena_dsn: str, tree: Path
):
    result = helena("process-pending", "docs", dsn=helena_dsn)
    assert result.returncode == 0
    assert "3 found: 3 new" in result.stdout
    assert f"{tree}/bad.md" in result.stdout
    assert result.stderr == ""


def test_a_dry_run_writes_nothing_anywhere(helena: Helena, helena_dsn: str, tree: Path):
    document = answer(helena("process-pending", str(tree), "--dry-run", "--json", dsn=helena_dsn))
    assert document["documents"]["new"] == 3
    assert document["operations"]["accepted"] == 0
    assert count(helena_dsn, DOCUMENTS) == 0
    assert count(helena_dsn, "SELECT count(*) FROM helena.roots") == 0
    assert answer(helena("status", "--json", dsn=helena_dsn))["queue"]["total"] == 0
    assert (
        "nothing was claimed"
        in helena("process-pending", "docs", "--dry-run", dsn=helena_dsn).stdout
    )


def test_an_unknown_path_is_2(helena: Helena, helena_dsn: str):
    said = complaint(helena("process-pending", "/no/such/folder", dsn=helena_dsn), 2)
    assert "/no/such/folder" in said


def test_without_a_path_the_current_directory_is_left_alone(
    helena: Helena, helena_dsn: str, tree: Path
):
    document = answer(helena("process-pending", "--json", dsn=helena_dsn))
    assert document["documents"]["found"] == 0
    assert count(helena_dsn, DOCUMENTS) == 0


def test_whoever_gives_no_folder_is_told_that_no_document_was_looked_at(
    helena: Helena, helena_dsn: str
):
    shown = helena("process-pending", dsn=helena_dsn).stdout
    assert "not looked at: neither a PATH nor [documents] roots" in shown


def test_a_given_file_that_is_no_document_is_named(helena: Helena, helena_dsn: str, tree: Path):
    for name in ("a.txt", "b.png"):
        (tree / name).touch()
    result = helena("process-pending", *map(str, sorted(tree.iterdir())), dsn=helena_dsn)
    assert result.returncode == 0
    assert f"{tree / 'a.txt'} and 1 more file" in result.stderr
    assert ".md, .markdown" in result.stderr


def test_the_configured_roots_are_the_default_paths(
    helena: Helena, helena_dsn: str, tree: Path, folder: Path
):
    (folder / "helena.toml").write_text('[documents]\nroots = ["docs"]\n')
    document = answer(helena("process-pending", "--json", dsn=helena_dsn))
    assert document["documents"]["new"] == 3


def test_operations_that_waited_before_the_run_are_reported_and_not_held_against_it(
    helena: Helena, queued: Path, helena_dsn: str, tree: Path
):
    result = helena("process-pending", str(tree), dsn=helena_dsn)
    assert result.returncode == 0
    assert "1 remaining (1 must wait: 1 for a table)" in result.stdout
    assert "nowhere" in result.stdout
    assert count(helena_dsn, DOCUMENTS) == 3


def test_operations_that_have_to_wait_since_this_run_make_it_partial(
    helena: Helena, helena_dsn: str, state_dir: Path
):
    helena("status", dsn=helena_dsn)
    spool = spool_in(state_dir)
    spool.append("insert", "nowhere", {"id": 1})
    spool.close()
    result = helena("process-pending", dsn=helena_dsn)
    assert result.returncode == 1
    assert "1 remaining (1 must wait: 1 for a table)" in result.stdout


def test_a_table_that_was_created_is_written_at_once_and_not_after_its_next_try(
    helena: Helena, queued: Path, helena_dsn: str
):
    for _ in range(5):
        # Each time it would be longer until the next try.
        helena("process-pending", dsn=helena_dsn)
    with psycopg.connect(helena_dsn) as connection:
        connection.execute("CREATE TABLE nowhere (id int PRIMARY KEY)")
    document = answer(helena("process-pending", "--json", dsn=helena_dsn))
    assert document["operations"]["remaining"] == 0
    assert count(helena_dsn, "SELECT count(*) FROM nowhere") == 1


def test_an_operation_whose_parent_has_come_is_written_at_once(
    helena: Helena, helena_dsn: str, state_dir: Path
):
    helena("status", dsn=helena_dsn)
    spool = spool_in(state_dir)
    spool.append("insert", "es_document_usage_log", {"es_doc_id": "late", "accessed_by": "me"})
    spool.close()
    for _ in range(3):
        result = helena("process-pending", dsn=helena_dsn)
    assert "1 remaining (1 must wait: 1 for the row of another table)" in result.stdout
    with psycopg.connect(helena_dsn) as connection:
        connection.execute(
            "INSERT INTO es_document_references (es_index, es_doc_id) VALUES ('i', 'late')"
        )
    result = helena("process-pending", dsn=helena_dsn)
    assert "1 written" in result.stdout
    assert count(helena_dsn, "SELECT count(*) FROM es_document_usage_log") == 1


def test_operations_that_the_database_refuses_make_the_run_partial(
    helena: Helena, helena_dsn: str, state_dir: Path
):
    helena("status", dsn=helena_dsn)
    spool = spool_in(state_dir)
    spool.append("insert", "messages", {"id": "no sender"})
    spool.close()
    result = helena("process-pending", dsn=helena_dsn)
    assert result.returncode == 1
    assert "1 dead" in result.stdout
    assert "helena dead-letters list" in result.stderr
    assert helena("process-pending", dsn=helena_dsn).returncode == 0


def test_pruning_needs_a_yes_and_says_what_goes_with_it(
    helena: Helena, helena_dsn: str, tree: Path
):
    helena("process-pending", "docs", dsn=helena_dsn)
    (tree / "one.md").unlink()
    with psycopg.connect(helena_dsn) as connection:
        connection.execute(
            "INSERT INTO es_document_usage_log (es_doc_id, accessed_by) VALUES ('docs:one.md', 'x')"
        )
    refused = helena("process-pending", "docs", "--prune", dsn=helena_dsn)
    assert refused.returncode == 5
    assert "1 document marked as missing, 1 row of usage; none deleted" in refused.stdout
    assert "docs:one.md" in refused.stdout
    document = answer(helena("process-pending", "docs", "--prune", "--json", dsn=helena_dsn), 5)
    assert document["prune"] == {"documents": ["docs:one.md"], "usage_rows": 1, "deleted": 0}
    assert count(helena_dsn, DOCUMENTS) == 3
    dry = helena("process-pending", "docs", "--prune", "--yes", "--dry-run", dsn=helena_dsn)
    assert (dry.returncode, count(helena_dsn, DOCUMENTS)) == (0, 3)
    done = helena("process-pending", "docs", "--prune", "--yes", "--json", dsn=helena_dsn)
    assert answer(done)["prune"]["deleted"] == 1
    assert count(helena_dsn, DOCUMENTS) == 2
    assert count(helena_dsn, "SELECT count(*) FROM es_document_usage_log") == 0


def test_two_runs_at_once_over_one_tree_index_each_document_once(
    helena: Helena, helena_dsn: str, tree: Path
):
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(helena, "process-pending", "docs", "--json", dsn=helena_dsn)
            for _ in range(2)
        ]
        documents = [answer(run.result())["documents"] for run in runs]
    assert sorted(document["new"] for document in documents) == [0, 3]
    assert count(helena_dsn, DOCUMENTS) == 3


def test_ctrl_c_is_130_and_loses_nothing(
    folder: Path, state_dir: Path, helena_dsn: str, tree: Path
):
    pause = threading.Event()
    with psycopg.connect(helena_dsn) as holder:
        holder.execute("LOCK TABLE helena.spool_position")
        with subprocess.Popen(
            [sys.executable, "-m", "helena_cli", "process-pending", "docs"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=variables(folder, state_dir, helena_dsn),
        ) as process:
            while not count(helena_dsn, "SELECT count(*) FROM pg_locks WHERE NOT granted"):
                assert process.poll() is None
                pause.wait(0.05)
            process.send_signal(signal.SIGINT)
            holder.rollback()
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    spool = spool_in(state_dir)
    law = spool.conservation()
    spool.close()
    assert law.accepted == law.written + law.spooled > 0
    assert count(helena_dsn, DOCUMENTS) == (3 if law.written else 0)


@pytest.mark.slow
@pytest.mark.skipif(not embedded.available(), reason="needs the embedded PostgreSQL")
def test_without_any_configuration_the_embedded_database_serves(helena: Helena, tree: Path):
    document = answer(helena("process-pending", "docs", "--json"))
    assert document["documents"]["new"] == 3
    assert document["operations"]["remaining"] == 0
    status = answer(helena("status", "--json"))
    assert status["database"]["target"] == "embedded PostgreSQL"
    assert status["database"]["reachable"] is True
    assert answer(helena("process-pending", "docs", "--json"))["documents"] == SAME
