"""`helena stop-realtime` and those who restart: systemd, supervisord and cron, each the real one.

launchd has only its recorded commands, in tests/unit/test_stop_launchd.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helena_cli.host.processes import find
from tests import system_systemd
from tests.commands import Program
from tests.hosts import wait_until
from tests.realtime import DEAF, SLEEPS, Writers
from tests.system_systemd import SystemSystemd
from tests.user_systemd import UserSystemd

pytestmark = pytest.mark.acceptance

AWAY = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=2"


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    found = Writers(tmp_path)
    yield found
    found.close()


@pytest.fixture
def helena(tmp_path: Path, state_dir: Path, writers: Writers) -> Program:
    """The program, which looks for the writers `a` to `d`; its database is away."""
    program = Program(tmp_path, state_dir, AWAY)
    program.variables |= {
        "HELENA_REALTIME_PROCESSES": ",".join(map(writers.name, "abcd")),
        "HELENA_REALTIME_QUIET": "1",
        "HELENA_REALTIME_GRACE": "1",
    }
    return program


def runs(writers: Writers, label: str) -> bool:
    return bool(find([writers.name(label)]))


# systemd: the system's manager


@pytest.fixture
def systemd(state_dir: Path) -> Iterator[SystemSystemd]:
    if system_systemd.obstacle():
        pytest.skip(str(system_systemd.obstacle()))
    folder = state_dir / "system"
    folder.mkdir()
    system = SystemSystemd(folder)
    try:
        if not system.answers():
            pytest.skip(f"systemd does not run here: {system.log()[-300:]}")
        yield system
    finally:
        system.close()


def inside(system: SystemSystemd, helena: Program, *arguments: str) -> Any:
    """What the program answers inside."""
    command = [sys.executable, "-m", "helena_cli", "stop-realtime", *arguments, "--json"]
    result = subprocess.run(
        system.enter(command), env=helena.variables, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def states(system: SystemSystemd, *units: str) -> list[str]:
    """Each as: active enabled."""
    active = system.output("systemctl", "is-active", *units).split()
    enabled = system.output("systemctl", "is-enabled", *units).split()
    return [f"{one} {other}" for one, other in zip(active, enabled, strict=True)]


def test_services_of_systemd_are_stopped_and_kept_from_starting_and_undo_brings_all_back(
    systemd: SystemSystemd, helena: Program, writers: Writers
):
    scripts = {label: writers.script(label) for label in "bcd"}
    scripts["a"] = writers.script("a", DEAF)
    start = f"import subprocess\nsubprocess.run({[sys.executable, str(scripts['c'])]})"
    # Written by the administrator, and deaf; from a package; behind a script; by a timer, later.
    systemd.service("own.service", [sys.executable, scripts["a"]])
    systemd.service("packaged.service", [sys.executable, scripts["b"]], vendor=True)
    systemd.service("wrapped.service", [sys.executable, writers.script("start", start)])
    systemd.service("timed.service", [sys.executable, scripts["d"]])
    timer = "[Timer]\nOnActiveSec=1h\nOnUnitActiveSec=1h\n[Install]\nWantedBy=test.target\n"
    (systemd.units / "timed.timer").write_text(f"[Unit]\nDefaultDependencies=no\n{timer}")
    units = ("own.service", "packaged.service", "timed.timer", "wrapped.service")
    systemd.run(["systemctl", "daemon-reload"])
    assert systemd.run(["systemctl", "enable", "--now", *units]) == 0
    for label in "abc":
        wait_until(scripts[label].with_suffix(".up").exists, f"{label} runs")
    before = states(systemd, *units)

    report = inside(systemd, helena, "--yes")
    assert {entry["job"] for entry in report["disabled"]} == set(units)
    assert (report["remaining"], report["failures"], report["notes"]) == (0, [], [])
    assert {entry["supervisor"] for entry in report["found"]} == {"systemd"}
    # The deaf one was killed, and has failed.
    assert states(systemd, *units) == [
        "failed disabled",
        "inactive masked",
        "inactive disabled",
        "inactive disabled",
    ]
    assert not any(runs(writers, label) for label in "abcd")
    assert inside(systemd, helena, "--yes")["found"] == []

    assert inside(systemd, helena, "--undo", "--yes")["remaining"] == 0
    assert states(systemd, *units) == before == ["active enabled"] * 4


# systemd: the user's manager


def test_a_service_of_the_user_is_stopped_and_disabled_and_undo_brings_it_back(
    user_manager: UserSystemd, helena: Program, writers: Writers
):
    helena.variables |= user_manager.variables
    path = writers.script("a")
    unit = Path(user_manager.variables["HOME"]) / ".config/systemd/user/writer.service"
    unit.parent.mkdir(parents=True)
    unit.write_text(
        f"[Service]\nExecStart={sys.executable} {path}\nRestart=always\nRestartSec=100ms\n"
        "[Install]\nWantedBy=default.target\n"
    )
    user_manager.ask("daemon-reload")
    user_manager.ask("enable", "--now", "writer.service")
    wait_until(path.with_suffix(".up").exists, "the writer runs")
    found = helena.json("stop-realtime", "--yes")
    assert [entry["supervisor"] for entry in found["found"]] == ["systemd --user"]
    assert [entry["job"] for entry in found["disabled"]] == ["writer.service"]
    assert user_manager.ask("is-enabled", "writer.service").stdout.strip() == "disabled"
    assert not runs(writers, "a")
    helena.json("stop-realtime", "--undo", "--yes")
    assert user_manager.ask("is-enabled", "writer.service").stdout.strip() == "enabled"
    wait_until(lambda: runs(writers, "a"), "the writer runs again")


# supervisord


@pytest.fixture
def supervisord(writers: Writers, state_dir: Path) -> Path:
    """The configuration of a supervisord that keeps `a`, `b` and a bystander running."""
    if not shutil.which("supervisord"):
        pytest.skip("supervisord is not installed")
    config = state_dir / f"supervisord-{writers.mark}.conf"
    programs = state_dir / "programs.ini"
    paths = {label: writers.script(label, SLEEPS) for label in ("a", "b", "bystander")}
    config.write_text(
        f"[unix_http_server]\nfile={state_dir}/s.sock\n"
        f"[supervisorctl]\nserverurl=unix://{state_dir}/s.sock\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory = "
        "supervisor.rpcinterface:make_main_rpcinterface\n"
        f"[supervisord]\nlogfile={state_dir}/s.log\npidfile={state_dir}/s.pid\n"
        "[include]\nfiles = programs.ini\n"
        "; The one that matters.\n"
        f"[program:first]\ncommand={sys.executable} {paths['a']} --password geheim ; as ever\n"
        "autostart=true\nstartsecs=0\n"
        f"[program:{writers.name('bystander')}]\n"
        f"command={sys.executable} {paths['bystander']} {paths['a']}\n"
        "autostart=true\nstartsecs=0\n"
    )
    programs.write_text(
        f"[program:several]\ncommand=nice {sys.executable} {paths['b']}\nnumprocs=2\n"
        "process_name=%(program_name)s_%(process_num)02d\nstartsecs=0\n"
    )
    writers.run(["supervisord", "-n", "-c", config])
    for path in paths.values():
        wait_until(path.with_suffix(".up").exists, f"{path.name} runs")
    return config


def test_programs_of_supervisord_are_stopped_for_good_and_undo_restores_its_files(
    supervisord: Path, helena: Program, writers: Writers
):
    files = (supervisord, supervisord.with_name("programs.ini"))
    before = [path.read_bytes() for path in files]
    report = helena.json("stop-realtime", "--yes")
    assert {entry["supervisor"] for entry in report["found"]} == {"supervisord"}
    assert {entry["job"] for entry in report["disabled"]} == {"first", "several"}
    assert len(report["stopped"]) == 3
    assert (report["remaining"], report["failures"], report["notes"]) == (0, [], [])
    assert "geheim" not in json.dumps(report)
    assert "as ever" not in json.dumps(report)
    assert not runs(writers, "a")
    assert not runs(writers, "b")
    assert runs(writers, "bystander")
    # Not even a supervisord that begins anew starts them.
    control(supervisord, "reload")
    wait_until(lambda: "RUNNING" in control(supervisord, "status"), "the bystander runs again")
    assert not runs(writers, "a")
    assert control(supervisord, "status").count("STOPPED") == 3
    helena.json("stop-realtime", "--undo", "--yes")
    assert [path.read_bytes() for path in files] == before
    wait_until(lambda: runs(writers, "a"), "the writer runs again")
    assert control(supervisord, "status").count("RUNNING") == 4


def control(config: Path, *words: str) -> str:
    return subprocess.run(
        ["supervisorctl", "-c", config, *words], capture_output=True, text=True, timeout=60
    ).stdout


def test_a_program_that_supervisord_is_about_to_restart_is_held_too(
    supervisord: Path, helena: Program, writers: Writers
):
    """It runs only now and then, so there may be no process to be seen."""
    config = supervisord.read_text()
    path = writers.script("c", "import time\ntime.sleep(0.1)\nraise SystemExit(3)")
    program = f"[program:broken]\ncommand={sys.executable} {path}\nstartretries=1000\n"
    supervisord.write_text(config + program)
    control(supervisord, "update")
    # And one that is named itself, whatever it runs.
    helena.variables["HELENA_REALTIME_SERVICES"] = f"{writers.name('bystander')},no-such-job"
    report = helena.json("stop-realtime", "--yes")
    jobs = {entry["job"] for entry in report["disabled"]}
    assert {"broken", writers.name("bystander")} <= jobs
    assert not runs(writers, "bystander")
    assert "broken                           STOPPED" in control(supervisord, "status")


# cron


@pytest.fixture
def crontabs(state_dir: Path) -> Iterator[list[str]]:
    """What starts a command where the crontabs are those of this test alone."""
    if os.geteuid() != 0 or not shutil.which("crontab") or not shutil.which("unshare"):
        pytest.skip("this needs root, crontab and unshare")
    spool, system = state_dir / "spool", state_dir / "system"
    spool.mkdir()
    system.mkdir()
    mounts = (
        "mount --make-rprivate / && "
        f"mount --bind {spool} /var/spool/cron/crontabs && mount --bind {system} /etc/cron.d && "
        'exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", mounts, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    yield command


def crontab(crontabs: list[str], *words: str, text: bytes = b"") -> bytes:
    return subprocess.run(
        [*crontabs, "crontab", *words], input=text, capture_output=True, check=True
    ).stdout


def apart(crontabs: list[str], helena: Program, *arguments: str) -> Any:
    """What the program answers where those crontabs are."""
    command = [sys.executable, "-m", "helena_cli", "stop-realtime", *arguments, "--json"]
    result = subprocess.run(
        [*crontabs, *command], env=helena.variables, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_lines_of_crontabs_are_marked_and_undo_restores_every_byte(
    crontabs: list[str], helena: Program, writers: Writers, state_dir: Path
):
    name = writers.name("a")
    python = sys.executable
    own = (
        f"# the morning, f\xfcr alle\nMAILTO=me\n"
        f"0 7 * * 1-5  cd /opt && {python} {name}.py --password geheim >> log 2>&1\n"
        f"#5 7 * * * {python} {name}.py\n"
        f"0 8 * * * grep {name}.py log\n"
        f"@reboot {python} -m {name}\n"
        f"0 9 * * * other"
    ).encode("latin-1") + b"\n"
    nobodys = f"*/5 * * * * flock -n /tmp/l {python} /opt/{name}.py\n".encode()
    crontab(crontabs, "-", text=own)
    crontab(crontabs, "-u", "nobody", "-", text=nobodys)
    system = state_dir / "system" / "helena-test"
    system.write_text(f"17 3 * * * nobody {python} {name}.py\n17 4 * * * {name} other\n")
    system.chmod(0o640)
    before = system.read_bytes()

    plan = apart(crontabs, helena, "--dry-run")
    assert crontab(crontabs, "-l") == own
    assert [entry["pid"] for entry in plan["found"]] == [None] * 4
    report = apart(crontabs, helena, "--yes")
    assert {entry["supervisor"] for entry in report["disabled"]} == {"cron"}
    assert len(report["disabled"]) == 4
    assert "geheim" not in json.dumps(report)
    changed = crontab(crontabs, "-l").split(b"\n")
    assert [line for line in changed if line.startswith(b"# helena stop-realtime: ")] == [
        b"# helena stop-realtime: " + line for line in (own.split(b"\n")[2], own.split(b"\n")[5])
    ]
    assert crontab(crontabs, "-u", "nobody", "-l").startswith(b"# helena stop-realtime: */5")
    assert system.read_text().startswith("# helena stop-realtime: 17 3")
    assert system.stat().st_mode & 0o777 == 0o640
    assert apart(crontabs, helena, "--yes")["found"] == []

    # What a person adds meanwhile stays.
    crontab(crontabs, "-", text=crontab(crontabs, "-l") + b"1 1 * * * added\n")
    assert apart(crontabs, helena, "--undo", "--yes")["remaining"] == 0
    assert crontab(crontabs, "-l") == own + b"1 1 * * * added\n"
    assert crontab(crontabs, "-u", "nobody", "-l") == nobodys
    assert system.read_bytes() == before


def test_a_line_that_starts_a_writer_through_a_script_is_found_by_what_runs(
    crontabs: list[str], helena: Program, writers: Writers
):
    path = writers.script("a")
    start = f"import subprocess\nsubprocess.run({[sys.executable, str(path)]})"
    command = f"cd /tmp; {sys.executable} {writers.script('start', start)}; true"
    crontab(crontabs, "-", text=f"* * * * * {command}\n".encode())
    # As cron does it.
    writers.run(["/bin/sh", "-c", command], up=path)
    report = apart(crontabs, helena, "--yes")
    assert [entry["supervisor"] for entry in report["found"]] == ["cron"]
    assert len(report["stopped"]) == len(report["disabled"]) == 1
    assert crontab(crontabs, "-l").startswith(b"# helena stop-realtime: ")
