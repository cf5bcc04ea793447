"""`helena service` against stand-ins for systemctl and launchctl, which record what they are told.

That the real systemd understands it is shown in tests/acceptance/test_service.py. launchd has only
its stand-in here, and the parser of property lists.
"""

import json
import os
import plistlib
from pathlib import Path
from typing import Any

import pytest

from helena_cli.cli import run
from helena_cli.host import services
from tests.service_managers import Managers

UNIT = "helena_batch_processor.service"


@pytest.fixture
def managers(state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Managers:
    """The stand-ins come first in PATH, and the service's process is this one."""
    monkeypatch.setenv("PATH", f"{state_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("HELENA_STATE_DIR", str(state_dir / "state"))
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "notes", "100% docs"):
        Path(name).mkdir()
    return Managers(state_dir, os.getpid())


@pytest.fixture
def macos(managers: Managers, monkeypatch: pytest.MonkeyPatch) -> Managers:
    monkeypatch.setattr(services, "PLATFORM", "darwin")
    return managers


@pytest.fixture
def helena(managers: Managers, capsys: pytest.CaptureFixture[str]):
    """Runs a command with --json and gives its document."""

    def answer(*arguments: str, code: int = 0) -> Any:
        assert run([*arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return answer


def unit_file() -> Path:
    return Path.home() / ".config/systemd/user" / UNIT


def agent_file() -> Path:
    return Path.home() / "Library/LaunchAgents/helena_batch_processor.plist"


# systemd


def test_install_tells_the_recorded_systemctl_to_load_enable_and_start(managers: Managers, helena):
    found = helena("service", "install", "docs")
    assert managers.told() == [
        "systemctl daemon-reload",
        f"systemctl enable {UNIT}",
        f"systemctl reset-failed {UNIT}",
        f"systemctl restart {UNIT}",
    ]
    assert f'HELENA_DOCUMENTS_ROOTS={Path("docs").absolute()}"' in unit_file().read_text()
    assert found["done"] == [f"wrote {unit_file()}", "enabled it", "started it"]
    assert (found["installed"], found["enabled"], found["active"]) == (True, True, True)


def test_a_second_install_of_the_same_changes_nothing(managers: Managers, helena):
    helena("service", "install", "docs")
    managers.told()
    before = unit_file().stat()
    found = helena("service", "install", "docs")
    assert found["done"] == []
    # Reading it changed the time of access.
    after = unit_file().stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not [line for line in managers.told() if line.startswith("systemctl")]


def test_an_install_of_something_else_changes_the_file_and_restarts(managers: Managers, helena):
    helena("service", "install", "docs")
    found = helena("service", "install", "docs", "notes")
    assert found["done"] == [f"changed {unit_file()}", "restarted it"]
    assert str(Path("notes").absolute()) in unit_file().read_text()


def test_an_install_starts_again_what_was_stopped_by_hand(managers: Managers, helena):
    helena("service", "install", "docs")
    managers.no_more("active")
    assert helena("service", "install", "docs")["done"] == ["started it"]


def test_a_service_that_does_not_start_is_an_error_that_says_where_to_look(
    managers: Managers, capsys
):
    managers.given("broken")
    assert run(["service", "install", "docs"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "does not start: Job for helena_batch_processor.service failed." in said.err
    assert "journalctl --user" in said.err
    assert "it said: helena: There is no section [batsh]." in said.err
    # Repaired: the failure does not stand in the way.
    managers.no_more("broken")
    assert run(["service", "install", "docs"]) == 0


def test_uninstall_tells_the_recorded_systemctl_to_stop_and_forget(managers: Managers, helena):
    helena("service", "install", "docs")
    managers.told()
    found = helena("service", "uninstall")
    assert managers.told() == [
        f"systemctl stop {UNIT}",
        f"systemctl disable {UNIT}",
        "systemctl daemon-reload",
        f"systemctl reset-failed {UNIT}",
    ]
    assert not unit_file().exists()
    assert found["done"] == ["stopped it", "disabled it", f"removed {unit_file()}"]
    assert (found["installed"], found["enabled"], found["active"]) == (False, False, False)
    assert helena("service", "uninstall")["done"] == []


def test_uninstall_works_with_a_configuration_that_is_broken(managers: Managers, helena):
    helena("service", "install", "docs")
    Path("helena.toml").write_text("[no such section]\n")
    assert helena("service", "uninstall")["installed"] is False


def test_status_exits_with_0_only_while_the_service_runs(managers: Managers, helena):
    found = helena("service", "status", code=1)
    assert (found["installed"], found["active"], found["state"]) == (
        False,
        False,
        "inactive (dead)",
    )
    helena("service", "install", "docs")
    found = helena("service", "status")
    assert (found["state"], found["pid"], found["restarts"]) == ("active (running)", os.getpid(), 2)
    assert found["since"] is not None
    assert found["text"] == "watching 2 folders"
    managers.no_more("active")
    managers.given("failed")
    found = helena("service", "status", code=1)
    assert (found["state"], found["exit_code"], found["pid"]) == ("failed", 3, None)


def test_status_says_what_to_do(managers: Managers, capsys):
    run(["service", "status"])
    assert "helena service install" in capsys.readouterr().out
    run(["service", "install", "docs"])
    capsys.readouterr()
    run(["service", "status"])
    assert "What to do" not in capsys.readouterr().out
    managers.no_more("active")
    managers.given("failed")
    run(["service", "status"])
    shown = capsys.readouterr().out
    assert "exit code 3" in shown
    assert "journalctl" in shown


def test_a_service_that_was_killed_is_told_from_one_that_ended(managers: Managers, helena, capsys):
    managers.given("killed")
    assert helena("service", "status", code=1)["exit_code"] == -9
    run(["service", "status"])
    assert "ended by signal 9" in capsys.readouterr().out


def test_install_tells_about_lingering_only_when_it_is_off(managers: Managers, helena):
    assert "loginctl enable-linger" in helena("service", "install", "docs")["hint"]
    managers.given("linger")
    assert helena("service", "install", "docs")["hint"] is None


def test_a_unit_of_somebody_else_is_not_touched(managers: Managers, capsys):
    unit_file().parent.mkdir(parents=True)
    unit_file().write_text("[Service]\nExecStart=/bin/mine\n")
    for command in (["install", "docs"], ["uninstall"]):
        assert run(["service", *command]) == 1
        assert "was not touched" in capsys.readouterr().err
    assert unit_file().read_text() == "[Service]\nExecStart=/bin/mine\n"
    assert managers.told() == []


def test_print_shows_the_file_and_changes_nothing(managers: Managers, capsys):
    managers.given("away")
    assert run(["service", "install", "docs", "--print"]) == 0
    shown = capsys.readouterr().out
    assert "ExecStart=" in shown
    assert not unit_file().parent.exists()
    assert managers.told() == []
    assert run(["service", "install", "docs", "--print", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"file": str(unit_file()), "text": shown}


def test_a_password_is_not_written_and_nothing_is_installed(
    managers: Managers, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HELENA_DSN", "postgresql://helena:hunter2@db/x")
    for extra in ([], ["--print"]):
        assert run(["service", "install", "docs", *extra]) == 3
        said = capsys.readouterr()
        assert "hunter2" not in said.out + said.err
        assert ".pgpass" in said.err
    assert not unit_file().exists()


@pytest.mark.parametrize("command", [["install", "100% docs"], ["uninstall"], ["status"]])
def test_without_a_service_manager_the_error_names_another_way(
    managers: Managers, capsys, monkeypatch: pytest.MonkeyPatch, command: list[str]
):
    monkeypatch.setattr(services, "BOOTED", "/no/such/folder")
    managers.given("away")
    assert run(["service", *command]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "Neither systemd nor launchd" in said.err
    assert "@reboot" in said.err
    assert "No medium found" in said.err
    # To cron a bare % is the end of the command.
    assert command[0] != "install" or "100\\% docs' " in said.err


def test_a_session_without_a_user_manager_is_told_how_to_get_one(
    managers: Managers, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(services, "BOOTED", str(managers.folder))
    managers.given("away")
    assert run(["service", "status"]) == 3
    assert f"XDG_RUNTIME_DIR=/run/user/{os.getuid()}" in capsys.readouterr().err


# launchd


def test_install_tells_the_recorded_launchctl_to_load_the_agent(macos: Managers, helena):
    target = f"gui/{os.getuid()}"
    found = helena("service", "install", "docs")
    assert macos.told() == [
        f"launchctl enable {target}/helena_batch_processor",
        f"launchctl bootstrap {target} {agent_file()}",
    ]
    assert found["done"] == [f"wrote {agent_file()}", "started it"]
    agent = plistlib.loads(agent_file().read_bytes())
    assert agent["EnvironmentVariables"]["HELENA_DOCUMENTS_ROOTS"] == str(Path("docs").absolute())
    assert helena("service", "install", "docs")["done"] == []


def test_another_install_stops_the_recorded_agent_first(macos: Managers, helena):
    helena("service", "install", "docs")
    macos.told()
    found = helena("service", "install", "notes")
    assert found["done"] == [f"changed {agent_file()}", "restarted it"]
    assert macos.told()[0] == f"launchctl bootout gui/{os.getuid()}/helena_batch_processor"


def test_uninstall_stops_the_recorded_agent_and_removes_its_file(macos: Managers, helena):
    helena("service", "install", "docs")
    found = helena("service", "uninstall")
    assert found["done"] == ["stopped it", f"removed {agent_file()}"]
    assert not agent_file().exists()
    assert helena("service", "uninstall")["done"] == []


def test_status_of_a_recorded_agent(macos: Managers, helena):
    assert helena("service", "status", code=1)["state"] == "not loaded"
    helena("service", "install", "docs")
    found = helena("service", "status")
    assert (found["state"], found["pid"], found["restarts"]) == ("running", os.getpid(), 2)
    assert found["enabled"] is True
    macos.given("disabled")
    assert helena("service", "status")["enabled"] is False


def test_an_agent_that_does_not_run_is_an_error_that_says_where_to_look(
    macos: Managers, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("helena_cli.host.launchd.START_LIMIT", 0.1)
    macos.given("broken")
    assert run(["service", "install", "docs"]) == 1
    said = capsys.readouterr().err
    assert "exit code 3" in said
    assert "Library/Logs" in said


def test_an_agent_that_was_killed_is_told_from_one_that_ended(macos: Managers, helena):
    (macos.folder / "active").touch()
    assert helena("service", "status", code=1)["exit_code"] == 3
    macos.given("killed")
    assert helena("service", "status", code=1)["exit_code"] == -9


def test_without_a_login_at_the_screen_launchd_refuses(macos: Managers, capsys):
    macos.given("away")
    assert run(["service", "status"]) == 3
    assert "Could not find domain" in capsys.readouterr().err
