"""When the compute was last used: what scale-to-zero decides by.

Counted as use: client sessions that run something (then it is now) or did so last, sessions opened since the last look however
short they were, replication other than walproposer's, enabled logical subscriptions' workers, autovacuum. Our own session is
not.
"""

import asyncio
import logging
from datetime import UTC, datetime

import psycopg

from neon_services.compute.apply_spec import connect
from neon_services.compute.status import ComputeStatus

log = logging.getLogger(__name__)

POLL_S = 1.0
_QUERY = """
SELECT max(CASE
    WHEN backend_type = 'client backend' AND state IN ('idle', 'disabled') THEN state_change
    WHEN backend_type = 'client backend' AND state IS NOT NULL THEN now()
    WHEN backend_type = 'walsender' AND application_name <> 'walproposer' THEN now()
    WHEN backend_type IN ('autovacuum worker', 'logical replication worker', 'logical replication apply worker') THEN now()
  END), now(), (SELECT sum(sessions)::bigint FROM pg_stat_database)
FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name <> 'compute_ctl'
"""


async def watch_activity(status: ComputeStatus, socket_directory: str, port: int) -> None:
    """Keep ``status.last_active`` up to date until cancelled."""
    while True:
        try:
            async with await connect(socket_directory, port) as session:
                # connect() ran statements, so this session is counted by the first look
                sessions: object = None
                while True:
                    row = await (await session.execute(_QUERY)).fetchone()
                    assert row is not None
                    used, now, counted = row
                    if sessions is not None and counted != sessions:
                        used = now  # a session that came and went between two looks
                    sessions = counted
                    if isinstance(used, datetime):
                        used = used.astimezone(UTC)
                        status.last_active = max(used, status.last_active or used)
                    await asyncio.sleep(POLL_S)
        except psycopg.Error as error:
            log.debug("activity: %s", error)  # Postgres is stopping, or out of connections for a while
        await asyncio.sleep(POLL_S)
