"""A finding's place as a file and a line."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple
from urllib.parse import quote

__all__ = ["Place"]


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    @classmethod
    def parse(cls, place: str | None) -> Place | None:
        """`file:line`; None for anything else."""
        file, _, line = (place or "").rpartition(":")
        if file and line.isascii() and line.isdecimal() and int(line) > 0:
            return cls(file, int(line))
        return None

    @property
    def uri(self) -> str:
        """Relative for a relative path, with forward slashes; `file://…` for an absolute one."""
        if PurePosixPath(self.file).is_absolute():
            return "file://" + _quoted(self.file)
        path = PureWindowsPath(self.file)
        if path.is_absolute() and path.drive.endswith(":"):
            return f"file:///{path.drive}" + _quoted(path.as_posix()[len(path.drive) :])
        if path.is_absolute():
            return "file:" + _quoted(path.as_posix())  # \\host\share
        return _quoted(path.as_posix())


def _quoted(path: str) -> str:
    # a file's name may be no text: its bytes, as Python keeps them in a string
    return quote(path, errors="surrogatepass")
