"""`helena service` under a real systemd, as its user manager. launchd has only tests/unit."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from helena_cli import config
from helena_cli.runtime import Runtime
from tests.commands import Program
from tests.hosts import wait_until
from tests.user_systemd import UserSystemd, obstacle

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.postgres,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]

UNIT = "helena_batch_processor.service"


@pytest.fixture
def systemd(user_manager: UserSystemd) -> UserSystemd:
    return user_manager


@pytest.fixture
def program(tmp_path: Path, state_dir: Path, helena_dsn: str, systemd: UserSystemd) -> Program:
    program = Program(tmp_path, state_dir, helena_dsn)
    program.variables |= systemd.variables
    program.variables["HELENA_BATCH_INTERVAL"] = "0.2"
    program.variables["HELENA_METRICS_ENABLED"] = "false"
    return program


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder with a name that a careless unit file would not survive."""
    folder = tmp_path / '100%h of ${HOME}\'s "notes" \\ für 🎉'
    folder.mkdir()
    return folder


@pytest.fixture
def quick(tmp_path: Path) -> None:
    """The service is started again at once, and watched closely: settings of the user's own."""
    folder = tmp_path / ".config/systemd/user" / f"{UNIT}.d"
    folder.mkdir(parents=True)
    (folder / "quick.conf").write_text("[Service]\nRestartSec=0.1\nWatchdogSec=4s\n")


def names(dsn: str) -> set[str]:
    """The documents in the database."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("SELECT filename FROM es_document_references")
        return {name for (name,) in rows}


def state(program: Program) -> Any:
    return json.loads(program.run("service", "status", "--json").stdout)


def another_process(program: Program, pid: int) -> Any:
    """The state once another process runs and is ready."""

    def found() -> Any:
        now = state(program)
        return now if now["active"] and now["pid"] not in (None, pid) else None

    return wait_until(found, "systemd starts it again")


def test_the_service_writes_what_is_saved_until_it_is_removed(
    program: Program, systemd: UserSystemd, docs: Path, helena_dsn: str
):
    # A comma: this one cannot be given as one of a list of roots.
    docs = docs / "a, b"
    docs.mkdir()
    (docs / "before.md").write_text("# Before")
    found = program.json("service", "install", str(docs))
    assert (found["active"], found["enabled"], found["state"]) == (True, True, "active (running)")
    (docs / "meanwhile.md").write_text("# Meanwhile")
    wait_until(lambda: names(helena_dsn) == {"before.md", "meanwhile.md"}, "both are written")
    assert program.json("service", "install", str(docs))["done"] == []
    # The end is a drain: what has just been saved is not left behind.
    (docs / "last.md").write_text("# Last")
    found = program.json("service", "uninstall")
    assert (found["installed"], found["active"], found["state"]) == (
        False,
        False,
        "inactive (dead)",
    )
    assert "last.md" in names(helena_dsn)
    assert not Path(found["file"]).exists()
    assert systemd.ask("cat", UNIT).returncode != 0
    assert list((program.folder / ".config/systemd").rglob("helena*")) == []


def test_a_service_that_was_killed_comes_back(
    program: Program, quick: None, docs: Path, helena_dsn: str
):
    first = program.json("service", "install", str(docs))
    os.kill(first["pid"], signal.SIGKILL)
    second = another_process(program, first["pid"])
    assert second["restarts"] == 1
    (docs / "after.md").write_text("# After")
    wait_until(lambda: names(helena_dsn) == {"after.md"}, "the new process writes")


def test_a_service_that_hangs_is_ended_by_the_watchdog_and_comes_back(
    program: Program, quick: None, docs: Path
):
    first = program.json("service", "install", str(docs))
    os.kill(first["pid"], signal.SIGSTOP)
    assert another_process(program, first["pid"])["restarts"] == 1


def test_a_service_that_works_is_left_alone_by_the_watchdog(
    program: Program, quick: None, docs: Path
):
    first = program.json("service", "install", str(docs))
    time.sleep(6)  # longer than the watchdog waits
    assert state(program)["pid"] == first["pid"]


def test_a_reload_keeps_the_process(program: Program, systemd: UserSystemd, docs: Path):
    first = program.json("service", "install", str(docs))
    assert systemd.ask("reload", UNIT).returncode == 0
    now = wait_until(lambda: (found := state(program))["active"] and found, "it is ready again")
    assert (now["pid"], now["restarts"]) == (first["pid"], 0)


def test_what_must_not_stand_in_the_unit_comes_from_a_file_of_its_own(
    program: Program, docs: Path, helena_dsn: str
):
    del program.variables["HELENA_DSN"]
    secrets = program.folder / ".config/helena/service.env"
    secrets.parent.mkdir(parents=True)
    secrets.write_text(f"HELENA_DSN={helena_dsn} password=hunter2\n")
    secrets.chmod(0o600)
    found = program.json("service", "install", str(docs))
    assert "hunter2" not in Path(found["file"]).read_text()
    (docs / "new.md").write_text("# New")
    wait_until(lambda: names(helena_dsn) == {"new.md"}, "it is written to that database")


def test_a_folder_that_is_not_mounted_yet_is_waited_for(
    program: Program, systemd: UserSystemd, docs: Path, helena_dsn: str
):
    program.json("service", "install", str(docs))
    systemd.ask("stop", UNIT)
    away = docs.rename(docs.with_name("away"))
    assert systemd.ask("start", UNIT).returncode == 0
    assert "1 away" in state(program)["text"]
    (away / "new.md").write_text("# New")
    away.rename(docs)
    wait_until(lambda: names(helena_dsn) == {"new.md"}, "the folder is back and read")


def test_a_configuration_that_is_wrong_is_not_tried_again_and_again(
    program: Program, quick: None, systemd: UserSystemd, docs: Path
):
    (program.folder / "helena.toml").write_text("")
    first = program.json("service", "install", str(docs))
    (program.folder / "helena.toml").write_text("[batch]\nsize = -1\n")
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: state(program)["state"] == "failed", "systemd gives up")
    found = state(program)
    assert (found["exit_code"], found["pid"], found["restarts"]) == (3, None, 1)
    shown = program.run("service", "status")
    assert shown.returncode == 1
    assert b"exit code 3" in shown.stdout
    # Mended, an install starts it again.
    (program.folder / "helena.toml").write_text("")
    assert program.json("service", "install", str(docs))["active"] is True


def test_the_embedded_server_stays_for_others_when_the_service_ends(
    program: Program, docs: Path, state_dir: Path
):
    del program.variables["HELENA_DSN"]
    program.json("service", "install", str(docs))
    settings = config.load(environ=program.variables)
    with Runtime(settings) as runtime, runtime.connect("test") as connection:
        program.json("service", "uninstall")
        assert connection.execute("SELECT 1").fetchone() == (1,)
