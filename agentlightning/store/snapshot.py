"""A SQLite file in WAL mode, read without writing a byte: neither to it, nor to the files that SQLite keeps beside it.

With one exception: SQLite leaves an empty `-wal` file if the last writer closes the file while a reader connects to it.

An ordinary connection creates `-wal` and `-shm` files, even one that only reads (https://sqlite.org/wal.html#readonly),
and one that reads only cannot remove them again.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

__all__ = ["ReadingConnection", "connect"]

# https://sqlite.org/fileformat.html#the_write_ahead_log
WAL_HEADER, SALT, SALT_OF_FRAME = 32, slice(16, 24), slice(8, 16)
FRAME_HEADER = 24
# More than one is needed only while writers come and go within milliseconds.
ATTEMPTS = 10

SHARED = "mode=ro&readonly_shm=1"
"""Another process has the file open, or was killed: take part in its locks, and leave the shared memory as it is."""
ALONE = "mode=ro&vfs=unix-none"
"""A copy of a file and its log, without shared memory: SQLite keeps that to itself in exclusive mode."""
CLOSED = "immutable=1"
"""Nobody had the file open, and it holds everything."""
# With SHARED, locks keep writers in order. Otherwise a writer that comes now is noticed afterwards: it changes the file
# only when it copies its log there.
COMPARED = {SHARED: (), ALONE: ("", "-wal"), CLOSED: ("",)}


class ReadingConnection(sqlite3.Connection):
    """A connection that writes nothing; see `connect`."""

    snapshot: Snapshot


def connect(path: Path, patience: float) -> ReadingConnection:
    """Connect to a file so that nothing is written.

    Args:
        path: an absolute path.
        patience: seconds to wait for a lock.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    for _ in range(ATTEMPTS - 1):
        snapshot = Snapshot(path)
        try:
            return snapshot.connect(patience)
        except sqlite3.OperationalError:
            # The last writer closed the file meanwhile, and removed its log and the shared memory.
            if Snapshot(path).options == snapshot.options:
                raise
    return Snapshot(path).connect(patience)


class Snapshot:
    """The state of a file at one moment, which decides how it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.options = self._choose()
        self._files = self._identities()

    def connect(self, patience: float) -> ReadingConnection:
        """Connect and take SQLite's locks, if the file is to be read with any."""
        uri = f"file:{quote(os.fsencode(self._path))}?{self.options}"
        connection = sqlite3.connect(
            uri, timeout=patience, check_same_thread=False, factory=ReadingConnection, uri=True
        )
        connection.snapshot = self
        try:
            if self.options == ALONE:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA schema_version")
        except BaseException:
            connection.close()
            raise
        return connection

    def is_intact(self) -> bool:
        """Tell whether all that was read through the connection is of one moment."""
        return self._identities() == self._files

    def _choose(self) -> str:
        wal = f"{self._path}-wal"
        if os.path.exists(f"{self._path}-shm") and os.path.exists(wal):
            return SHARED
        # Closing would remove a log that holds nothing.
        return ALONE if _has_frames(wal) else CLOSED

    def _identities(self) -> list[tuple[int, int, int] | None]:
        return [_identity(f"{self._path}{suffix}") for suffix in COMPARED[self.options]]


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _has_frames(wal: str) -> bool:
    """Tell whether a log holds a transaction: its first frame has the salt of the header, or it is of an older log."""
    try:
        with open(wal, "rb") as file:
            header, frame = file.read(WAL_HEADER), file.read(FRAME_HEADER)
    except OSError:
        return False
    return len(frame) == FRAME_HEADER and header[SALT] == frame[SALT_OF_FRAME]
