"""Which file is at a path now, asked without asking for its times.

``os.stat`` asks for the times too, and since Linux 6.13 the next write to a file whose times
were asked for must store finer ones: a journal commit more in every ``fsync``, a third of what a
durable charge costs. ``statx`` can ask for the inode alone; where there is none, ``os.stat`` does.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from accountant.errors import LedgerUnavailable

_STATX = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
_AT_FDCWD, _STATX_INO, _STATX_BYTES = -100, 0x100, 256
# struct statx of the kernel's ABI: stx_ino at 32, stx_dev_major and stx_dev_minor at 136
_INO, _DEVICE = struct.Struct("=Q"), struct.Struct("=II")
if _STATX is not None:
    _STATX.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    )


def inode(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file at a path, or None if there is none.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     inode(file.name) == (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)
    True
    >>> inode("/no/such/file") is None
    True

    Raises:
        OSError: If the path cannot be looked at.
    """
    if _STATX is not None and sys.platform == "linux":
        found = ctypes.create_string_buffer(_STATX_BYTES)
        if not _STATX(_AT_FDCWD, os.fsencode(path), 0, _STATX_INO, found):
            (number,) = _INO.unpack_from(found, 32)
            return os.makedev(*_DEVICE.unpack_from(found, 136)), number
        if ctypes.get_errno() in (errno.ENOENT, errno.ENOTDIR):
            return None
    try:
        status = os.stat(path)  # noqa: PTH116 - a Path costs as much as the call
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def check_in_place(path: str, file: tuple[int, int] | None, log: tuple[int, int] | None) -> None:
    """Raise if the files at an SQLite path are no longer the ones that are open.

    Closing any other handle on the file in this process drops SQLite's locks; another
    process may then take the write-ahead log away, and what is committed to it is lost.
    A second name (hard link) would have a log of its own.

    Args:
        path: Of the database.
        file: Device and inode of the database that is open.
        log: Those of its write-ahead log, or None where it is not known yet.

    Raises:
        LedgerUnavailable: If one of them is another file now, or the database has two names.
    """
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path costs as much as the call
        moved = (found.st_dev, found.st_ino) != file
    except (FileNotFoundError, NotADirectoryError):
        moved = True
    if moved or (log is not None and inode(f"{path}-wal") != log):
        raise LedgerUnavailable(
            f"{path} or its write-ahead log was moved, deleted or replaced while it was"
            " open; open it again, and never open, copy or hash the file in a process that"
            " has it open as a ledger"
        )
    if found.st_nlink > 1:
        raise LedgerUnavailable(f"{path} has a second name (hard link); remove that first")
