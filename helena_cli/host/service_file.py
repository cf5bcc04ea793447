"""The file by which a service manager knows the service: read, compared, written, removed."""

import contextlib
import os
import tempfile
from pathlib import Path

from helena_cli.errors import HelenaError

#: Stands in every file that Helena writes. A file without it is somebody else's.
MARK = "Written by helena service install"


class ServiceFile:
    """A service's file. Raises HelenaError when it cannot be used, or is not Helena's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes | None:
        """What stands there; None without a file."""
        try:
            # A masked unit is a link to /dev/null.
            if self.path.is_symlink():
                raise self._not_ours(f"it is a link to {os.readlink(self.path)}")
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HelenaError(
                f"{self.path} cannot be read: {error.strerror}.",
                remedy="Make it readable, or remove it.",
            ) from error
        if MARK.encode() not in text:
            raise self._not_ours("it was not written by helena service install")
        return text

    def update(self, text: bytes, found: bytes | None) -> list[str]:
        """Put the text there unless it is what was `found`; what was done for that, in words."""
        if found == text:
            return []
        self.write(text)
        return [f"{'wrote' if found is None else 'changed'} {self.path}"]

    def write(self, text: bytes) -> None:
        """Put the whole file there, or leave what is there."""
        fresh = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, fresh = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            with open(handle, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(handle)
            os.replace(fresh, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise HelenaError(
                f"{self.path} cannot be written: {error.strerror}.",
                remedy="Make the folder writable; helena service install --print shows the file.",
            ) from error

    def remove(self) -> None:
        """Remove it, if it is there."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise HelenaError(
                f"{self.path} cannot be removed: {error.strerror}.",
                remedy="Remove it by hand.",
            ) from error

    def _not_ours(self, why: str) -> HelenaError:
        return HelenaError(
            f"{self.path} was not touched: {why}.",
            remedy="Move it away, or systemctl --user unmask it, and run the same command again.",
        )
