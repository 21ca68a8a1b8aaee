"""The file of a per-unit filter: its tables, the statements on them, and how it is made."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from accountant.notes import fsync_folder
from accountant.stores.lane_state import LaneState

APPLICATION_ID = 0x6570736C
"""``epsl``: marks an SQLite file as the lanes of a per-unit filter."""

_SCHEMA = f"""
CREATE TABLE entry (
    seq INTEGER PRIMARY KEY, price INTEGER NOT NULL, digest BLOB NOT NULL, head BLOB NOT NULL
);
CREATE TABLE body (seq INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE snapshot (seq INTEGER PRIMARY KEY, seal BLOB NOT NULL, spent BLOB NOT NULL);
PRAGMA application_id={APPLICATION_ID};
"""
ENTRIES = """
SELECT seq, price, digest, head, body FROM entry LEFT JOIN body USING (seq)
WHERE seq > ? ORDER BY seq LIMIT ?
"""
ADD_ENTRY = "INSERT INTO entry VALUES (?, ?, ?, ?)"
ADD_BODY = "INSERT INTO body VALUES (?, ?)"
ADD_SNAPSHOT = "INSERT INTO snapshot VALUES (?, ?, ?)"
DROP_BODIES = """
DELETE FROM body WHERE seq IN (SELECT seq FROM entry WHERE price > 0 AND seq > ?)
"""


def create_file(path: Path, terms: Sequence[Any]) -> None:
    """Make the file if there is none; it appears at its path complete, or not at all."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists():
            return
        descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # mode 0600
        os.close(descriptor)
        part = Path(name)
        try:
            with closing(sqlite3.connect(part)) as connection, connection:
                connection.executescript(_SCHEMA)
                first = LaneState().begin(terms)
                connection.execute(ADD_ENTRY, first[:-1])
                connection.execute(ADD_BODY, (first.seq, first.body))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            fsync_folder(path)
        finally:
            part.unlink(missing_ok=True)
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open, too
        os.close(folder)
