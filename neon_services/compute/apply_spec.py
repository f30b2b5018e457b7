"""Bring roles and databases to the state that the specification asks for, by SQL.

Every step is idempotent and writes only what differs, so that a start with nothing to change commits nothing.
"""

import logging
import re

import psycopg
from psycopg import sql

from neon_services.compute.apply_deltas import change_databases, delete_roles, rename_roles
from neon_services.compute.postgres_conf import SUPERUSER
from neon_services.compute.spec import ComputeSpec, Database, Option, Role
from neon_services.ground.errors import ConfigError, NeonError

log = logging.getLogger(__name__)

_OPTION_NAME = re.compile(r"^[A-Za-z_ ]+$")
_BARE_VALUE = re.compile(r"^[A-Za-z0-9_+.-]*$")
_NEW_ROLE = sql.SQL("INHERIT CREATEROLE CREATEDB BYPASSRLS REPLICATION")


def _connection(socket_directory: str, port: int, database: str = "postgres") -> str:
    return psycopg.conninfo.make_conninfo(
        host=socket_directory, port=port, user=SUPERUSER, dbname=database, application_name="compute_ctl", connect_timeout=10
    )


async def connect(socket_directory: str, port: int) -> psycopg.AsyncConnection[tuple[object, ...]]:
    """A superuser session without a statement timeout, autocommit."""
    connection = await psycopg.AsyncConnection.connect(_connection(socket_directory, port), autocommit=True)
    await connection.execute("SET statement_timeout = 0")
    await connection.execute("SET idle_in_transaction_session_timeout = 0")
    return connection


async def apply_spec(spec: ComputeSpec, privileged_role: str, socket_directory: str, port: int) -> None:
    """Create and change roles and databases. Raises NeonError that says what Postgres refused."""
    try:
        async with await connect(socket_directory, port) as session:
            await _privileged_role(session, privileged_role)
            await _drop_invalid_databases(session)
            await rename_roles(session, spec.delta_operations)
            await _roles(session, spec.roles, privileged_role)
            await change_databases(session, spec.delta_operations)
            await _databases(session, spec.databases, privileged_role)
            await _health_check_table(session)
            if spec.delta_operations:
                query = "SELECT datname FROM pg_database WHERE datallowconn"
                names = [str(name) for (name,) in await (await session.execute(query)).fetchall()]
                connections = {name: _connection(socket_directory, port, name) for name in names}
                await delete_roles(session, spec.delta_operations, connections)
    except psycopg.Error as error:
        raise NeonError(f"applying the specification: {str(error).strip()}") from error


Session = psycopg.AsyncConnection[tuple[object, ...]]


async def _privileged_role(session: Session, name: str) -> None:
    found = await (await session.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,))).fetchone()
    if not found:
        statement = (
            "CREATE ROLE {} CREATEDB CREATEROLE NOLOGIN REPLICATION BYPASSRLS IN ROLE pg_read_all_data, pg_write_all_data"
        )
        await session.execute(sql.SQL(statement).format(sql.Identifier(name)))


async def _drop_invalid_databases(session: Session) -> None:
    """What an interrupted DROP DATABASE has left."""
    rows = await (await session.execute("SELECT datname FROM pg_database WHERE datconnlimit = -2")).fetchall()
    for (name,) in rows:
        log.warning("dropping database %s, which an interrupted DROP DATABASE has left", name)
        await session.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(str(name))))


def _option_sql(options: tuple[Option, ...], where: str) -> sql.Composable:
    parts: list[sql.Composable] = []
    for option in options:
        if not _OPTION_NAME.match(option.name):
            raise ConfigError(f"{where}: {option.name!r} is not the name of an option")
        if option.vartype == "string":
            parts.append(sql.SQL(" {} {}").format(sql.SQL(option.name), sql.Literal(option.value)))  # type: ignore[arg-type]
        elif _BARE_VALUE.match(option.value):
            parts.append(sql.SQL(f" {option.name} {option.value}"))  # type: ignore[arg-type]
        else:
            raise ConfigError(f"{where}: option {option.name} has the impossible value {option.value!r}")
    return sql.Composed(parts)


async def _roles(session: Session, roles: tuple[Role, ...], privileged_role: str) -> None:
    rows = await (await session.execute("SELECT rolname, rolpassword FROM pg_authid")).fetchall()
    existing = {str(name): password for name, password in rows}
    for role in roles:
        name = sql.Identifier(role.name)
        options = _option_sql(role.options, f"spec.cluster.roles {role.name!r}")
        password = sql.SQL(" PASSWORD {}").format(sql.Literal(role.verifier)) if role.verifier else sql.SQL("")
        if role.name not in existing:
            statement = sql.SQL("CREATE ROLE {} LOGIN {}{}{} IN ROLE {}")
            await session.execute(statement.format(name, _NEW_ROLE, password, options, sql.Identifier(privileged_role)))
        elif (role.verifier and existing[role.name] != role.verifier) or role.options:
            await session.execute(sql.SQL("ALTER ROLE {} WITH LOGIN{}{}").format(name, password, options))


async def _databases(session: Session, databases: tuple[Database, ...], privileged_role: str) -> None:
    query = "SELECT datname, rolname FROM pg_database LEFT JOIN pg_roles ON pg_roles.oid = datdba"
    owners = {str(name): owner for name, owner in await (await session.execute(query)).fetchall()}
    for database in databases:
        name, owner = sql.Identifier(database.name), sql.Identifier(database.owner)
        if database.name not in owners:
            options = _option_sql(database.options, f"spec.cluster.databases {database.name!r}")
            await session.execute(sql.SQL("CREATE DATABASE {} OWNER {}{}").format(name, owner, options))
        elif owners[database.name] != database.owner:
            await session.execute(sql.SQL("ALTER DATABASE {} OWNER TO {}").format(name, owner))
        await _grant_all(session, database.name, privileged_role)


async def _grant_all(session: Session, database: str, role: str) -> None:
    query = (
        "SELECT bool_and(has_database_privilege(%s::text, %s::text, privilege)) "
        "FROM unnest(ARRAY['CREATE', 'CONNECT', 'TEMPORARY']) AS privilege"
    )
    row = await (await session.execute(query, (role, database))).fetchone()
    if not row or not row[0]:
        statement = sql.SQL("GRANT ALL PRIVILEGES ON DATABASE {} TO {}")
        await session.execute(statement.format(sql.Identifier(database), sql.Identifier(role)))


async def _health_check_table(session: Session) -> None:
    row = await (await session.execute("SELECT to_regclass('public.health_check') IS NOT NULL")).fetchone()
    if not row or not row[0]:
        await session.execute(
            "CREATE TABLE IF NOT EXISTS public.health_check (id serial PRIMARY KEY, updated_at timestamptz DEFAULT now());"
            "INSERT INTO public.health_check VALUES (1, now()) ON CONFLICT (id) DO NOTHING"
        )


async def check_writability(socket_directory: str, port: int) -> None:
    """Write one row, durably. Raises NeonError when that does not work."""
    try:
        async with await connect(socket_directory, port) as session:
            await session.execute("SET statement_timeout = '30s'")
            await session.execute(
                "INSERT INTO public.health_check VALUES (1, now()) ON CONFLICT (id) DO UPDATE SET updated_at = now()"
            )
    except psycopg.Error as error:
        raise NeonError(f"the compute cannot write: {str(error).strip()}") from error
