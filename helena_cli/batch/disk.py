"""What a path lies on. A spool must not lie on the network: SQLite needs a local disk."""

import logging
import stat
from pathlib import Path

import psutil

from helena_cli.errors import SpoolUnavailable

log = logging.getLogger(__name__)

#: File systems on which SQLite's WAL and file locks cannot be relied upon.
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb3", "afs", "ncpfs", "ceph", "lustre", "beegfs"}
    | {"fuse.sshfs", "glusterfs", "fuse.glusterfs", "davfs", "fuse.davfs2", "webdav", "afpfs"}
)


def file_system(path: Path) -> str:
    """The kind of file system that this path lies on, "" when nobody knows."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    place = path.resolve()
    while str(place) not in mounts and place != place.parent:
        place = place.parent
    return mounts.get(str(place), "")


def is_network(kind: str) -> bool:
    """Whether a file system of this kind lies on another machine."""
    return kind.lower() in NETWORK_FILE_SYSTEMS


def refuse_network(path: Path) -> None:
    """Raise SpoolUnavailable when this directory lies on a network file system."""
    kind = file_system(path)
    if is_network(kind):
        raise SpoolUnavailable(
            f"The state directory {path} lies on a network file system ({kind}).",
            remedy="SQLite is not safe there. Set HELENA_STATE_DIR to a directory on a local disk.",
        )


def warn_if_shared(path: Path) -> None:
    """Say it when anybody may put other files in the place of ours."""
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        log.warning("every user may change the state directory %s: chmod 700 %s", path, path)
