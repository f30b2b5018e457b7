"""Answers to pagestream requests: which LSN is meant, and what is there.

Invariant: a page served at LSN L has exactly the effects of all records that end at or before L; a block at or beyond the
relation's size at L is a page of zeros. Consecutive GetPage requests are answered by one vectored read per effective LSN.
"""

from collections.abc import Sequence

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import format_lsn
from neon_services.pageserver import keys, slru
from neon_services.pageserver.keys import PAGE_SIZE, RelTag
from neon_services.pageserver.relations import UNKNOWN, Relations
from neon_services.pageserver.timeline import LsnTimeout, MissingKey, Timeline
from neon_services.protocols import pagestream
from neon_services.protocols.pagestream import Request

_ZERO_PAGE = bytes(PAGE_SIZE)


class BadRequest(NeonError):
    """The client's fault."""


class NotFound(NeonError):
    """What was asked for is not there at this LSN."""


class PageRequests:
    """Answers the requests of one connection about one timeline."""

    def __init__(self, timeline: Timeline, version: int, wait_lsn_timeout_s: float) -> None:
        self._timeline = timeline
        self._relations = Relations.of(timeline)
        self._version = version
        self._wait_lsn_timeout_s = wait_lsn_timeout_s

    async def answer(self, requests: Sequence[Request]) -> list[bytes]:
        """One CopyData payload per request, in order. Errors of a request become its error response.

        Raises Cancelled when the timeline shuts down: the connection must end, the client reconnects.
        """
        answers: list[bytes] = []
        start = 0
        while start < len(requests):
            end = start
            while end < len(requests) and requests[end].tag == pagestream.GET_PAGE:
                end += 1
            if end > start:
                answers += await self._get_pages(requests[start:end])
                start = end
            else:
                answers.append(await self._answer_one(requests[start]))
                start += 1
        return answers

    # -- LSNs

    async def _effective_lsn(self, request: Request) -> int:
        """The LSN to read at: not before ``not_modified_since``, not after the tip."""
        timeline, wanted, since = self._timeline, request.request_lsn, request.not_modified_since
        if wanted < since:
            raise BadRequest(f"request LSN {format_lsn(wanted)} is below not_modified_since {format_lsn(since)}")
        if wanted == 0:
            raise BadRequest("invalid LSN(0) in request")
        if wanted < timeline.latest_gc_cutoff_lsn:
            raise BadRequest(
                "tried to request a page version that was garbage collected. "
                f"requested at {format_lsn(wanted)} gc cutoff {format_lsn(timeline.latest_gc_cutoff_lsn)}"
            )
        if since > timeline.last_record_lsn:
            await timeline.wait_lsn(since, self._wait_lsn_timeout_s)
            return since
        return min(timeline.last_record_lsn, wanted)

    def _error(self, request: Request, error: NeonError) -> bytes:
        prefix = "Read error: "
        if isinstance(error, BadRequest):
            prefix = "Bad request: "
        elif isinstance(error, NotFound):
            prefix = "Not found: "
        elif isinstance(error, LsnTimeout):
            prefix = "LSN timeout: "
        return pagestream.error_response(request, f"{prefix}{error}", self._version)

    # -- pages

    async def _get_pages(self, requests: Sequence[Request]) -> list[bytes]:
        answers: list[bytes] = [b""] * len(requests)
        by_lsn: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            try:
                by_lsn.setdefault(await self._effective_lsn(request), []).append(number)
            except (BadRequest, LsnTimeout) as error:
                answers[number] = self._error(request, error)
        for lsn, numbers in by_lsn.items():
            pages = await self._read_pages([requests[number].body for number in numbers], lsn)
            for number, page in zip(numbers, pages, strict=True):
                request = requests[number]
                if isinstance(page, bytes):
                    answers[number] = pagestream.response_prefix(request, self._version) + page
                else:
                    answers[number] = self._error(request, page)
        return answers

    async def _read_pages(self, bodies: Sequence[tuple[int, ...]], lsn: int) -> list[bytes | NeonError]:
        """Pages of (spc, db, rel, fork, block) at one LSN; an error in place of a page that cannot be had."""
        tags = [RelTag(*body[:4]) for body in bodies]
        sizes = [self._relations.cached_size(tag, lsn) for tag in tags]
        if UNKNOWN in sizes:
            sizes = await self._relations.sizes(tags, lsn)
        answers: list[bytes | NeonError] = [_ZERO_PAGE] * len(bodies)
        read: list[int] = []
        for number, (body, tag, size) in enumerate(zip(bodies, tags, sizes, strict=True)):
            if tag.rel == 0 or tag.fork > keys.INIT_FORK:
                answers[number] = BadRequest(f"invalid relation {tag}")
            elif body[4] < (size or 0):
                read.append(number)
        if read:
            halves = [keys.relation_block(tags[number], bodies[number][4]) for number in read]
            values = await self._timeline.get_many([hi for hi, _ in halves], [lo for _, lo in halves], lsn)
            for number, value in zip(read, values, strict=True):
                answers[number] = value
        return answers

    # -- everything else

    async def _answer_one(self, request: Request) -> bytes:
        try:
            lsn = await self._effective_lsn(request)
            payload = await self._payload(request, lsn)
        except (BadRequest, NotFound, LsnTimeout, MissingKey) as error:
            return self._error(request, error)
        return pagestream.response_prefix(request, self._version) + payload

    async def _payload(self, request: Request, lsn: int) -> bytes:
        if request.tag in (pagestream.EXISTS, pagestream.NBLOCKS):
            tag = RelTag(*request.body)
            if tag.rel == 0:
                raise BadRequest("invalid relation node 0")
            size = await self._relations.size(tag, lsn)
            if request.tag == pagestream.EXISTS:
                return pagestream.encode_exists(size is not None)
            if size is None and tag.fork not in (keys.FSM_FORK, keys.VM_FORK):
                raise NotFound(f"relation {tag} does not exist at {format_lsn(lsn)}")
            return pagestream.encode_nblocks(size or 0)
        if request.tag == pagestream.DB_SIZE:
            size_bytes = await self._relations.database_size_bytes(keys.DEFAULT_TABLESPACE, request.body[0], lsn)
            return pagestream.encode_db_size(size_bytes)
        kind, segment = request.body
        if kind >= len(keys.SLRU_DIRECTORIES):
            raise BadRequest(f"unknown SLRU kind {kind}")
        segments = dict(await slru.list_segments(self._timeline, kind, lsn))
        if segment not in segments:
            raise NotFound(f"segment {segment:04X} of {keys.SLRU_DIRECTORIES[kind]} does not exist at {format_lsn(lsn)}")
        pages = await slru.read_segment(self._timeline, kind, segment, segments[segment], lsn)
        return pagestream.encode_slru_segment(pages)
