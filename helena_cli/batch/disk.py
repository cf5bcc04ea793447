"""Where a spool must not lie: SQLite's log and file locks need a local disk."""

from pathlib import Path

import psutil

from helena_cli.errors import SpoolUnavailable

#: File systems on which SQLite's WAL and file locks cannot be relied upon.
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smbfs", "smb3", "afs", "ncpfs", "ceph", "lustre", "beegfs"}
    | {"fuse.sshfs", "glusterfs", "fuse.glusterfs", "davfs", "fuse.davfs2", "webdav", "afpfs"}
)


def refuse_network(path: Path) -> None:
    """Raise SpoolUnavailable when this directory lies on a network file system."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    place = path.resolve()
    while str(place) not in mounts and place != place.parent:
        place = place.parent
    if mounts.get(str(place), "").lower() in NETWORK_FILE_SYSTEMS:
        raise SpoolUnavailable(
            f"The state directory {path} lies on a network file system ({mounts[str(place)]}).",
            remedy="SQLite is not safe there. Set HELENA_STATE_DIR to a directory on a local disk.",
        )
