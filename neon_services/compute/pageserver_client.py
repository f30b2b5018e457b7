"""What compute_ctl asks of the pageserver: the basebackup, and leases on the LSN that the compute reads at."""

import asyncio
import logging
import zlib

from neon_services.compute.spec import PageserverAddress
from neon_services.ground.errors import NeonError, ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.protocols import pgclient

log = logging.getLogger(__name__)

ATTEMPTS = 10
FIRST_PAUSE_S = 0.5
PAUSE_FACTOR = 1.5


async def _connect(address: PageserverAddress, ttid: TenantTimelineId, token: str | None) -> pgclient.PgClient:
    options = f"-c neon.compute_mode=primary -c tenant_id={ttid.tenant_id} -c timeline_id={ttid.timeline_id}"
    parameters = {"application_name": "compute_ctl", "options": options}
    return await pgclient.connect(address.host, address.port, parameters=parameters, password=token)


async def fetch_basebackup(
    address: PageserverAddress, ttid: TenantTimelineId, lsn: Lsn, token: str | None, *, first_pause_s: float = FIRST_PAUSE_S
) -> bytes:
    """The tar of the basebackup at ``lsn``, unpacked. Tries 10 times; raises NeonError with the last failure."""
    pause_s = first_pause_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await _fetch_once(address, ttid, lsn, token)
        except (OSError, TimeoutError, NeonError) as error:
            reason = str(error) or type(error).__name__
            if attempt == ATTEMPTS:
                raise NeonError(
                    f"no basebackup of timeline {ttid} at {format_lsn(lsn)} from pageserver {address.host}:{address.port} "
                    f"after {ATTEMPTS} attempts: {reason}"
                ) from error
            log.warning("basebackup, attempt %d of %d: %s", attempt, ATTEMPTS, reason)
        await asyncio.sleep(pause_s)
        pause_s *= PAUSE_FACTOR
    raise AssertionError("unreachable")


async def _fetch_once(address: PageserverAddress, ttid: TenantTimelineId, lsn: Lsn, token: str | None) -> bytes:
    client = await _connect(address, ttid, token)
    try:
        command = f"basebackup {ttid.tenant_id} {ttid.timeline_id} {format_lsn(lsn)} --gzip --skeleton"
        unpacker = zlib.decompressobj(wbits=31)
        chunks: list[bytes] = []
        # to the very end: an error of the server may follow the last byte of the tar
        async for chunk in client.copy_out(command):
            chunks.append(unpacker.decompress(chunk))
        if not unpacker.eof:
            raise ProtocolViolation("the basebackup ends in the middle")
        return b"".join(chunks)
    except zlib.error as error:
        raise ProtocolViolation(f"the basebackup is not gzip: {error}") from error
    finally:
        client.close()


async def lease_lsn(address: PageserverAddress, ttid: TenantTimelineId, lsn: Lsn, token: str | None) -> int | None:
    """Ask that history at ``lsn`` is kept. Until when (milliseconds since 1970), or None when it is refused.

    Raises OSError, TimeoutError or NeonError when there is no answer.
    """
    client = await _connect(address, ttid, token)
    try:
        async with asyncio.timeout(10):
            rows = await client.query(f"lease lsn {ttid.tenant_id} {ttid.timeline_id} {format_lsn(lsn)} ")
    finally:
        client.close()
    if not rows or not rows[0] or rows[0][0] is None:
        return None
    if not rows[0][0].isdecimal():
        raise ProtocolViolation(f"the pageserver answered {rows[0][0]!r} to a request for a lease")
    return int(rows[0][0])
