"""The PostgreSQL store: for writers on several hosts.

A write transaction locks the rows of the budgets that it charges, in order of name, so that
writers of other budgets go on. Reads and writes are pipelined: a batch of charges is three
round trips. A commit is acknowledged only when it is durable by the server's settings, which
are probed when the ledger is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from sqlalchemy import URL, Connection, create_engine, event

from accountant.errors import (
    AccountantError,
    InvalidRequest,
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    SchemaMismatch,
)
from accountant.requests import WHOLE_LEDGER
from accountant.stores.schema import METADATA, SCHEMA_VERSION, new_ledger, postgres_triggers
from accountant.stores.sql import SqlStore
from accountant.stores.statements import MUTABLE, TABLES, Statements

try:
    import psycopg
except ModuleNotFoundError as missing:
    raise ImportError(
        f"{missing.name} is missing; install it with: pip install 'epsledger[postgres]'"
    ) from missing

_LOG = logging.getLogger(__name__)
_SETTINGS = {
    "synchronous_commit": "on",
    "default_transaction_isolation": "read committed",  # what is read under a lock is the newest
    "lock_timeout": "30s",
    "statement_timeout": "10min",
    "idle_in_transaction_session_timeout": "1min",
}
_CONNECTION = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""A network that went away is noticed within half a minute."""
_BIRTH = 0x65707364_6C656467
"""Advisory lock for whoever makes an empty database a ledger."""


class PostgresStore(SqlStore):
    """A ledger in a PostgreSQL database.

    Args:
        url: A ``postgresql+psycopg://`` URL.
        create: Whether missing tables are created.

    Raises:
        LedgerUnavailable: If it cannot be reached, or would not keep what it acknowledges.
        SchemaMismatch: If another schema version wrote it.
    """

    statements: ClassVar[Statements] = Statements("%s", " FOR UPDATE")
    _driver_error = psycopg.Error

    def __init__(self, url: URL, *, create: bool = True) -> None:
        # The isolation is named here, too: a connection that was read from is reset to it.
        engine = create_engine(
            url.update_query_dict({**_CONNECTION, **url.query}),
            max_overflow=-1,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",
        )
        event.listen(engine, "connect", _configure)
        self._held: frozenset[str] = frozenset()
        self._doubt: str | None = None
        super().__init__(url, engine, create=create)

    def covers(self, names: frozenset[str]) -> bool:
        """Say whether the transaction in hand holds the lock of these budgets."""
        return names <= self._held

    def warnings(self) -> list[str]:
        """Return what could lose acknowledged charges here: standbys that may be behind."""
        with self.engine.connect() as connection:
            return probe(connection)

    def missing_triggers(self) -> list[str]:
        """Return the names of the triggers that were dropped, disabled, or do something else."""
        function, *triggers = postgres_triggers()
        query = (
            "SELECT t.tgname, t.tgrelid::regclass::text FROM pg_trigger t"
            " JOIN pg_proc p ON p.oid = t.tgfoid"
            " WHERE t.tgenabled IN ('O', 'A') AND position(p.prosrc IN %s) > 0"
            " AND t.tgrelid = ANY(ARRAY(SELECT to_regclass(unnest(%s::text[]))::oid))"
        )
        with self.engine.connect() as connection:
            tables = [table.name for table in METADATA.sorted_tables]
            found = {row[0] for row in connection.exec_driver_sql(query, (function, tables))}
        return [name for name in (text.split()[2] for text in triggers) if name not in found]

    def _prepare(self, *, create: bool) -> str:
        with self.engine.begin() as connection:
            for warning in probe(connection):
                _LOG.warning("%s: %s", self.place, warning)
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (_BIRTH,))
            known = "SELECT to_regclass('epsledger_ledger') IS NOT NULL"
            if not connection.exec_driver_sql(known).scalar():
                if not create:
                    raise self._no_ledger()
                METADATA.create_all(connection, checkfirst=False)
                new_ledger(connection)
            found = connection.exec_driver_sql("SELECT id, schema_version FROM epsledger_ledger")
            identity, version = found.one()
            if version != SCHEMA_VERSION:
                raise SchemaMismatch(self.place, version, SCHEMA_VERSION)
            return str(identity)

    def _connect(self) -> Any:
        connection = self.engine.raw_connection()
        driver: Any = connection.driver_connection
        driver.add_notice_handler(self._notice)
        return connection

    def _notice(self, diagnostic: Any) -> None:
        # A cancelled wait for a standby commits here alone, and says so only in a warning.
        if diagnostic.severity_nonlocalized == "WARNING":
            self._doubt = diagnostic.message_primary

    def _begin(self, names: frozenset[str]) -> None:
        self._held, self._doubt = names, None
        if WHOLE_LEDGER in names:
            self._execute("SELECT id FROM epsledger_ledger FOR UPDATE", ())

    def _commit(self) -> None:
        self._driver.commit()
        if self._doubt is not None:
            raise OutcomeUnknown(self._doubt)

    def _roll_back(self) -> None:
        if self._connection is None:
            return
        try:
            self._driver.rollback()
        except psycopg.Error:
            self._discard()
        else:
            if self._driver.closed:
                self._discard()

    def _execute(self, statement: str, values: Sequence[Any]) -> list[Any]:
        rows: list[Any] = self._driver.execute(statement, values).fetchall()
        return rows

    def _execute_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        with self._driver.cursor() as cursor:
            cursor.executemany(statement, rows)
            changed: int = cursor.rowcount
            return changed

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    def _translate(self, error: BaseException) -> AccountantError:
        if isinstance(error, psycopg.errors.RaiseException | psycopg.IntegrityError):
            return LedgerCorrupt(f"{self.place}: {error}")
        return LedgerUnavailable(f"{self.place}: {error}; nothing was charged")


def probe(connection: Connection) -> list[str]:
    """Return what could lose acknowledged charges; raise where they would be lost for sure.

    Raises:
        LedgerUnavailable: If this is a standby, or the server does not sync what it commits.
    """

    def setting(name: str) -> str:
        return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())

    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar():
        raise LedgerUnavailable("this server is a standby; open the ledger on the primary")
    for name in ("fsync", "full_page_writes"):
        if setting(name) != "on":
            raise LedgerUnavailable(
                f"the server runs with {name}=off: a crash would lose acknowledged charges;"
                " turn it on"
            )
    commit = setting("synchronous_commit")
    if commit not in ("on", "remote_apply"):
        raise LedgerUnavailable(f"synchronous_commit is {commit!r} and must be 'on'")
    warnings = []
    standbys = connection.exec_driver_sql("SELECT count(*) FROM pg_stat_replication").scalar_one()
    if standbys and not setting("synchronous_standby_names"):
        warnings.append(
            f"no standby is synchronous, of {standbys}: a failover loses the last charges;"
            " set synchronous_standby_names = 'ANY 1 (*)'"
        )
    return warnings


def role_statements(role: str) -> str:
    """Return SQL for an application's role: it can read and append, and not rewrite.

    It can update what a charge must: of a budget the position of its last entry with the sums, of
    a reservation its marks. Sums that are not those of the entries are found by ``verify``.

    Args:
        role: Name of the role, which must exist.

    Raises:
        InvalidRequest: If no role can have that name.

    >>> print(role_statements("rag_app").splitlines()[0])
    GRANT SELECT ON epsledger_ledger TO "rag_app";
    """
    if not 1 <= len(role.encode()) <= 63 or not role.isprintable():
        raise InvalidRequest(f"role {role!r} must be 1 to 63 printable bytes")
    to = 'TO "' + role.replace('"', '""') + '";\n'
    append = "epsledger_entry, epsledger_event, epsledger_checkpoint"
    state = "".join(
        f"GRANT SELECT, INSERT, UPDATE ({', '.join(columns)}) ON {TABLES[row]} {to}"
        for row, columns in MUTABLE.items()
    )
    return (
        f"GRANT SELECT ON epsledger_ledger {to}"
        f"GRANT UPDATE (id) ON epsledger_ledger {to[:-1]}  -- to lock it; no trigger allows more\n"
        f"GRANT SELECT, INSERT ON {append} {to}{state}"
    )


def _configure(connection: Any, _record: object) -> None:
    for name, value in _SETTINGS.items():
        connection.execute(f"SET {name} = '{value}'")
    connection.commit()
