"""Renames and deletions of the specification (``delta_operations``): what a list of desired objects cannot say.

Every operation is idempotent: one whose object is gone, or was renamed already, does nothing.
"""

import logging

import psycopg
from psycopg import sql

from neon_services.compute.postgres_conf import SUPERUSER
from neon_services.compute.spec import DeltaOperation

log = logging.getLogger(__name__)

Session = psycopg.AsyncConnection[tuple[object, ...]]


async def _exists(session: Session, query: str, name: str) -> bool:
    return await (await session.execute(query, (name,))).fetchone() is not None  # type: ignore[arg-type]


_ROLE = "SELECT 1 FROM pg_roles WHERE rolname = %s"
_DATABASE = "SELECT 1 FROM pg_database WHERE datname = %s"


async def rename_roles(session: Session, operations: tuple[DeltaOperation, ...]) -> None:
    """Before roles are created, so that the new name is not taken for a missing role."""
    await _rename(session, [o for o in operations if o.action == "rename_role"], _ROLE, "ROLE")


async def change_databases(session: Session, operations: tuple[DeltaOperation, ...]) -> None:
    """Delete and rename databases, in the order of the specification."""
    for operation in operations:
        if operation.action == "delete_db" and await _exists(session, _DATABASE, operation.name):
            log.info("dropping database %s", operation.name)
            await session.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(operation.name)))
        elif operation.action == "rename_db":
            await _rename(session, [operation], _DATABASE, "DATABASE")


async def _rename(session: Session, operations: list[DeltaOperation], query: str, kind: str) -> None:
    for operation in operations:
        new_name = operation.new_name or ""
        if await _exists(session, query, operation.name) and not await _exists(session, query, new_name):
            statement = sql.SQL(f"ALTER {kind} {{}} RENAME TO {{}}")  # type: ignore[arg-type]
            await session.execute(statement.format(sql.Identifier(operation.name), sql.Identifier(new_name)))


async def delete_roles(session: Session, operations: tuple[DeltaOperation, ...], connection_of: dict[str, str]) -> None:
    """Last of all: what the roles own goes to the owner of its database first. ``connection_of`` is by database."""
    names = [o.name for o in operations if o.action == "delete_role" and await _exists(session, _ROLE, o.name)]
    for name in names:
        role = sql.Identifier(name)
        for database, conninfo in connection_of.items():
            async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as inside:
                query = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s"
                row = await (await inside.execute(query, (database,))).fetchone()
                heir = str(row[0]) if row and row[0] != name else SUPERUSER
                await inside.execute(sql.SQL("REASSIGN OWNED BY {} TO {}").format(role, sql.Identifier(heir)))
                await inside.execute(sql.SQL("DROP OWNED BY {}").format(role))
        log.info("dropping role %s", name)
        await session.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(role))
