"""Units of processes, and a recorded systemctl that refuses or gives no answer.

The real systemd is in tests/acceptance/test_stop_supervisors.py.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helena_cli.errors import HelenaError
from helena_cli.host.supervisors import Job, Wanted
from helena_cli.host.supervisors.systemd import Systemd, Unit, unit_of

UNIFIED = "0::{}\n"
LEGACY = "4:memory:/other.service\n1:name=systemd:{}\n"


@pytest.mark.parametrize("form", [UNIFIED, LEGACY])
@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/brief.service", Unit("brief.service", None)),
        ("/system.slice/system-brief.slice/brief@7.service", Unit("brief@7.service", None)),
        ("/system.slice/brief.service/worker", Unit("brief.service", None)),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/brief.service",
            Unit("brief.service", 1000),
        ),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", None),
        ("/user.slice/user-1000.slice/session-3.scope", None),
        ("/", None),
    ],
)
def test_the_control_group_tells_the_service(form: str, path: str, unit: Unit | None):
    assert unit_of(form.format(path)) == unit


@pytest.fixture
def systemctl(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a systemctl in the way that runs this script of the shell."""
    monkeypatch.setenv("PATH", f"{state_dir}:{os.environ['PATH']}")

    def write(script: str) -> None:
        program = state_dir / "systemctl"
        program.write_text(f'#!/bin/sh\necho "$*" >> "{state_dir}/calls"\n{script}\n')
        program.chmod(0o755)

    return write


BRIEF = Job(
    supervisor="systemd",
    name="brief.service",
    command="python brief.py",
    undo="",
    facts={"active": True, "enabled": True, "mask": True, "path": "/opt/brief.service"},
)


def test_a_refusal_of_the_recorded_systemctl_is_told_before_anything_is_stopped(
    systemctl, state_dir: Path
):
    systemctl('echo "Failed to disable unit: Interactive authentication required." >&2; exit 1')
    with pytest.raises(HelenaError, match="Interactive authentication required") as caught:
        Systemd().hold(BRIEF, 1.0)
    assert caught.value.remedy.endswith("sudo systemctl disable brief.service")
    calls = (state_dir / "calls").read_text().splitlines()
    assert calls == ["--no-ask-password disable brief.service"]


def test_a_unit_that_does_not_end_is_killed_through_the_recorded_systemctl(
    systemctl, state_dir: Path
):
    systemctl(
        f'[ "$2" = stop ] && [ ! -e {state_dir}/killed ] && exec sleep 60\n'
        f'[ "$2" = kill ] && touch {state_dir}/killed\nexit 0'
    )
    Systemd().hold(BRIEF, 0.2)
    assert (state_dir / "calls").read_text().replace("--no-ask-password ", "").splitlines() == [
        "disable brief.service",
        "mask brief.service",
        "stop brief.service",
        "kill --signal=KILL brief.service",
        "stop brief.service",
    ]


def test_a_unit_whose_link_is_gone_is_enabled_by_its_file_in_the_recorded_systemctl(
    systemctl, state_dir: Path
):
    systemctl('[ "$2 $3" != "enable brief.service" ]')
    Systemd().release(BRIEF)
    assert (state_dir / "calls").read_text().replace("--no-ask-password ", "").splitlines() == [
        "unmask brief.service",
        "enable brief.service",
        "enable /opt/brief.service",
        "start brief.service",
    ]


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "exec sleep 60"])
def test_a_systemctl_that_knows_nothing_means_no_units(
    systemctl, monkeypatch: pytest.MonkeyPatch, script: str
):
    monkeypatch.setattr("helena_cli.host.supervisors.systemd.ASK", 0.3)
    systemctl(script)
    assert Systemd().jobs(Wanted(("brief",)), []) == []


def test_the_users_manager_is_found_after_sudo_in_the_recorded_systemctl(
    systemctl, state_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where no variable says where it listens."""
    monkeypatch.setattr("helena_cli.host.supervisors.systemd.RUNTIME", state_dir)
    folder = state_dir / str(os.geteuid())
    (folder / "systemd" / "private").mkdir(parents=True)
    argv = "argv[]=/usr/bin/python3 /opt/brief.py ; ignore_errors=no"
    systemctl(
        f'[ "$XDG_RUNTIME_DIR" = "{folder}" ] || exit 1\n'
        f'echo "Id=brief.service\nActiveState=active\nExecStart={{ path=x ; {argv} }}"'
    )
    (job,) = Systemd().jobs(Wanted(("brief",)), [])
    assert (job.supervisor, job.name) == ("systemd --user", "brief.service")
