"""Synthetic WAL and a proposer that streams it; requests that must fail."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import SafekeeperId
from tests.integration.safekeeper_support import Fleet, ScriptedProposer, new_ttid
from tests.unit.safekeeper.walmaker import PG_VERSION, SYSTEM_ID, WalMaker

START = Lsn(0x1002028)


def proposer(wal: WalMaker, **options: Any) -> ScriptedProposer:
    return ScriptedProposer(
        ttid=options.pop("ttid", None) or new_ttid(),
        start=wal.start,
        wal=wal.data,
        pg_version=PG_VERSION,
        system_id=SYSTEM_ID,
        **options,
    )


def error_of(method: str, url: str, body: Any = None) -> tuple[int, str]:
    """Status and message of a request that must fail."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(request, timeout=10)
    return failure.value.code, json.loads(failure.value.read())["msg"]


def members_of(fleet: Fleet) -> tuple[SafekeeperId, ...]:
    return tuple(SafekeeperId(node.id, "127.0.0.1", node.pg_port) for node in fleet.nodes)
