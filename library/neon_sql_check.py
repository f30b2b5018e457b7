#!/usr/bin/python
"""Prove by SQL that a compute commits and reads."""

from __future__ import annotations

import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: neon_sql_check
short_description: Prove by SQL that a compute commits and reads
description:
  - Connects as a client would, commits a transaction that leaves nothing behind (a logical message), and reads the catalogs.
  - The commit returns only when a quorum of safekeepers has the WAL on disk, so an answer proves the whole write path.
  - Needs psycopg in the Python that runs it.
options:
  host:
    description: Address of the compute.
    type: str
    required: true
  port:
    description: Port of the compute.
    type: int
    required: true
  user:
    description: Role to connect as.
    type: str
    required: true
  password:
    description: Its password.
    type: str
    required: true
  database:
    description: Database to connect to.
    type: str
    required: true
  timeout_s:
    description: How long a compute that has just started may take.
    type: int
    default: 60
"""

ARGUMENTS = {
    "host": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "user": {"type": "str", "required": True},
    "password": {"type": "str", "required": True, "no_log": True},
    "database": {"type": "str", "required": True},
    "timeout_s": {"type": "int", "default": 60},
}


def check(connect, deadline: float) -> dict[str, str]:
    """Commit and read; what the server said. ``connect`` makes a connection; tries again until the deadline."""
    import psycopg

    while True:
        try:
            with connect() as connection:
                connection.execute("SELECT pg_logical_emit_message(true, 'neon_verify', 'commit')")
                connection.commit()
                lsn, version, relations = connection.execute(
                    "SELECT pg_current_wal_flush_lsn()::text, version(), (SELECT count(*) FROM pg_class)::text"
                ).fetchone()
                return {"lsn": lsn, "version": version, "relations": relations}
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    p = module.params
    try:
        import psycopg
    except ImportError as error:
        module.fail_json(msg=f"psycopg is missing: run this with the Python of an installed release ({error})")

    def connect() -> psycopg.Connection:
        return psycopg.connect(
            host=p["host"], port=p["port"], user=p["user"], password=p["password"], dbname=p["database"], connect_timeout=10,
            options="-c statement_timeout=30s",
        )  # fmt: skip

    try:
        answer = check(connect, time.monotonic() + p["timeout_s"])
    except psycopg.Error as error:
        module.fail_json(msg=f"the compute at {p['host']}:{p['port']} does not answer SQL: {error}")
    module.exit_json(changed=False, **answer)


if __name__ == "__main__":
    main()
