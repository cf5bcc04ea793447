"""On which file systems a queue may lie."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helena_cli.batch.disk import refuse_network
from helena_cli.errors import SpoolUnavailable


def mounted(monkeypatch: pytest.MonkeyPatch, **types: str) -> None:
    """Let the machine have these mounts; a name is a path with _ for /."""
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    mounts += [
        SimpleNamespace(mountpoint=name.replace("_", "/"), fstype=kind)
        for name, kind in types.items()
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)


@pytest.mark.parametrize("kind", ["nfs4", "CIFS", "fuse.sshfs"])
def test_a_directory_on_a_network_file_system_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, kind: str
):
    mounted(monkeypatch, _home=kind)
    with pytest.raises(SpoolUnavailable, match=kind) as caught:
        refuse_network(Path("/home/somebody/state"))
    assert "HELENA_STATE_DIR" in caught.value.remedy


def test_a_local_disk_inside_or_beside_a_network_file_system_will_do(
    monkeypatch: pytest.MonkeyPatch,
):
    mounted(monkeypatch, _home="nfs4", _home_local="xfs")
    refuse_network(Path("/home/local/state"))
    refuse_network(Path("/homes/somebody"))
    refuse_network(Path("/var/lib"))
