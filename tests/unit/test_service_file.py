"""The service's file: what systemd and a reader of property lists take from it."""

import plistlib
import subprocess
import sys
from pathlib import Path

import pytest

from helena_cli import config
from helena_cli.errors import ConfigurationError, HelenaError, UsageError
from helena_cli.host import job, services, unit
from helena_cli.host.job import Job
from helena_cli.host.launchd import Launchd
from helena_cli.host.service_file import ServiceFile
from tests.analysed_unit import ODD, Analysed, a_job, needs_systemd

# systemd


@needs_systemd
def test_systemd_has_no_complaint_about_the_unit(tmp_path: Path):
    found = Analysed(unit.text(a_job(*ODD, variables={"HELENA_STATE_DIR": "/a b"})), tmp_path)
    assert (found.code, found.complaints) == (0, "")


@needs_systemd
def test_systemd_takes_the_promises_of_the_unit_as_they_are_meant(tmp_path: Path):
    text = unit.text(a_job())
    found = Analysed(text, tmp_path)
    # Without the colon variables would be replaced; systemd does not show that.
    assert "\nExecStart=:" in text
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "Restart": "on-failure",
        "RestartSec": "10s",
        "TimeoutStopSec": "1min 40s",
        "WatchdogSec": "2min",
        "KillMode": "process",
        "OOMPolicy": "continue",
        "UMask": "0077",
        "RestrictSUIDSGID": "yes",
        "LockPersonality": "yes",
        "RestrictRealtime": "yes",
    }
    assert {name: found.values(name) for name in expected} == {
        name: [value] for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "text", ["a\nb", "a\x7f", "caf\udce9", " a", "a\\", "\ufdd0", "\U0001ffff"]
)
def test_what_no_unit_file_can_hold_is_refused(text: str):
    with pytest.raises(ConfigurationError):
        job.refuse_unwritable(text)


# launchd


def test_the_agent_starts_at_login_and_again_after_a_failure():
    agent = plistlib.loads(Launchd().text(a_job()))
    assert agent["Label"] == "helena_batch_processor"
    assert agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    assert agent["ExitTimeOut"] == 100
    assert agent["Umask"] == 0o077


# What is run


def test_the_job_carries_what_the_environment_says_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    environ = {
        "HELENA_BATCH_INTERVAL": "2",
        "HELENA_STATE_DIR": "queue",
        "DATABASE_URL": "postgresql://helena@db/archive",
        "PGSSLMODE": "require",
        "SECRET_OF_ANOTHER_PROGRAM": "x",
    }
    carried = config.service_variables(config.load(environ=environ), environ)
    assert carried == {
        "HELENA_BATCH_INTERVAL": "2",
        "HELENA_STATE_DIR": str(tmp_path / "queue"),
        "DATABASE_URL": "postgresql://helena@db/archive",
        "PGSSLMODE": "require",
    }


def test_variables_that_do_not_count_are_not_carried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    environ = {"HELENA_DSN": "host=a", "DATABASE_URL": "postgresql://u:secret@b/c"}
    settings = config.load(environ=environ, options={"database": {"dsn": "host=c"}})
    assert set(config.service_variables(settings, environ)) == {"HELENA_STATE_DIR"}
    # Of no use to the embedded server.
    monkeypatch.chdir("/")
    environ = {"PGPASSWORD": "secret", "PGSSLMODE": "require"}
    assert set(config.service_variables(config.load(environ=environ), environ)) == {
        "HELENA_STATE_DIR"
    }


@pytest.mark.parametrize(
    ("environ", "culprit"),
    [
        ({"HELENA_DSN": "postgresql://u:secret@host/d"}, "HELENA_DSN"),
        ({"HELENA_DSN": "host=a password=secret"}, "HELENA_DSN"),
        ({"DATABASE_URL": "postgresql://u:secret@host/d"}, "DATABASE_URL"),
        ({"PGHOST": "a", "PGPASSWORD": "secret"}, "PGPASSWORD"),
        ({"HELENA_DATABASE_DIRECT_DSN": "host=a password=secret"}, "HELENA_DATABASE_DIRECT_DSN"),
    ],
)
def test_a_password_is_refused_by_the_name_of_its_variable_and_never_repeated(
    environ: dict[str, str], culprit: str
):
    with pytest.raises(ConfigurationError) as caught:
        config.service_variables(config.load(environ=environ), environ)
    assert culprit in str(caught.value)
    assert "secret" not in str(caught.value) + caught.value.remedy


def test_the_job_names_everything_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("helena.toml").write_text("")
    for name in ("docs", "-odd", "a,b"):
        Path(name).mkdir()
    found = config.load(environ={}, options={"database": {"dsn": "host=a"}})
    options = ("watch", "--config", str(tmp_path / "helena.toml"), "--dsn", "host=a")
    wanted = job.watch(found, ["docs", "-odd"])
    assert Path(wanted.command[0]).is_absolute()
    assert wanted.command[-5:] == options
    # As roots, which may come later; a path has to be there.
    assert wanted.variables["HELENA_DOCUMENTS_ROOTS"] == f"{tmp_path}/docs,{tmp_path}/-odd"
    wanted = job.watch(found, ["docs", "a,b"])
    assert wanted.command[-8:] == (*options, "--", f"{tmp_path}/docs", f"{tmp_path}/a,b")
    assert "HELENA_DOCUMENTS_ROOTS" not in wanted.variables


def test_the_service_watches_the_same_folders_as_the_call_that_installed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "other"):
        Path(name).mkdir()
    environ = {"HELENA_DOCUMENTS_ROOTS": "other"}
    # The paths of the call go before what the environment says.
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    wanted = job.watch(config.load(environ=environ), ["docs"])
    roots = config.load(environ=wanted.variables).documents.roots
    assert roots == (str(tmp_path / "docs"),)


def test_a_folder_that_is_not_there_is_refused_as_by_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no folder 'dosc'"):
        job.watch(config.load(environ={}), ["dosc"])


def test_configured_roots_are_left_to_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("helena.toml").write_text('[documents]\nroots = ["docs"]\n')
    command = job.watch(config.load(environ={})).command
    assert command[-3:] == ("watch", "--config", str(tmp_path / "helena.toml"))


def test_there_is_no_service_without_anything_to_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        job.watch(config.load(environ={}))


def test_the_line_for_cron_is_read_by_a_shell_as_it_is_meant(tmp_path: Path):
    folder = tmp_path / "100% of 'it'"
    folder.mkdir()
    code = "import os, sys; print(os.getcwd(), os.environ['A'], sys.argv[1:])"
    wanted = Job(
        (sys.executable, "-c", code, *ODD), {"A": "b $c", "B": "x"}, str(folder), "", 100.0
    )
    start, _, line = services.cron_line(wanted).partition(" ")
    assert start == "@reboot"
    assert "%" not in line.replace("\\%", "")
    shown = subprocess.run(["sh", "-c", line.replace("\\%", "%")], capture_output=True, text=True)
    assert shown.stdout == f"{folder} b $c {list(ODD)}\n"


# The file on the disk


def test_a_file_that_helena_did_not_write_is_left_alone(tmp_path: Path):
    path = tmp_path / "unit"
    path.write_text("[Unit]\n")
    with pytest.raises(HelenaError, match="not written by helena"):
        ServiceFile(path).read()
    path.unlink()
    path.symlink_to("/dev/null")
    with pytest.raises(HelenaError, match="/dev/null"):
        ServiceFile(path).read()


def test_a_file_is_there_in_full_or_not_at_all(tmp_path: Path):
    file = ServiceFile(tmp_path / "new" / "unit")
    assert file.read() is None
    file.write(b"Written by helena service install: 1")
    file.write(b"Written by helena service install: 2")
    assert file.read() == b"Written by helena service install: 2"
    assert [path.name for path in file.path.parent.iterdir()] == ["unit"]
    # A folder in its place cannot be replaced; what was begun is cleaned away.
    file.remove()
    file.remove()
    (file.path / "occupied").mkdir(parents=True)
    with pytest.raises(HelenaError):
        file.write(b"x")
    assert [path.name for path in file.path.parent.iterdir()] == ["unit"]
