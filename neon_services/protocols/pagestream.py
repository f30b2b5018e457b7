"""The pagestream protocol, v2 and v3, both ends: the payloads of CopyData after ``pagestream_v2`` or ``pagestream_v3``.

Layout, big-endian. Request: ``tag u8``, in v3 ``reqid u64``, ``request_lsn u64, not_modified_since u64``, body. Response of v2:
``tag u8, payload``; of v3: ``tag u8``, the request's ``reqid, request_lsn, not_modified_since`` and body again, payload (an
error echoes no body). A relation is ``spcnode u32, dbnode u32, relnode u32, forknum u8``.
"""

import struct
from dataclasses import dataclass

from neon_services.ground.errors import ProtocolViolation

V2, V3 = 2, 3
EXISTS, NBLOCKS, GET_PAGE, DB_SIZE, GET_SLRU_SEGMENT = range(5)
RESPONSE_BASE = 100
ERROR_RESPONSE = 103
PAGE_SIZE = 8192

_BODIES = {
    EXISTS: struct.Struct("!IIIB"),
    NBLOCKS: struct.Struct("!IIIB"),
    GET_PAGE: struct.Struct("!IIIBI"),
    DB_SIZE: struct.Struct("!I"),
    GET_SLRU_SEGMENT: struct.Struct("!BI"),
}
_RESPONSE_TAGS = {EXISTS: 100, NBLOCKS: 101, GET_PAGE: 102, DB_SIZE: 104, GET_SLRU_SEGMENT: 105}
_REQUEST_OF = {response: request for request, response in _RESPONSE_TAGS.items()}
_HEADERS = {V2: struct.Struct("!BQQ"), V3: struct.Struct("!BQQQ")}
_V3_ECHO = struct.Struct("!BQQQ")
_NAMES = {EXISTS: "Exists", NBLOCKS: "Nblocks", GET_PAGE: "GetPage", DB_SIZE: "DbSize", GET_SLRU_SEGMENT: "GetSlruSegment"}


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``body`` are the fields after the LSNs: a relation (and block), a database, or SLRU kind and segment."""

    tag: int
    request_lsn: int
    not_modified_since: int
    body: tuple[int, ...]
    reqid: int = 0

    @property
    def name(self) -> str:
        """What the request is called in logs."""
        return _NAMES[self.tag]


@dataclass(frozen=True, slots=True)
class Response:
    """One response; ``request`` is what a v3 server echoes (for an error without body). ``payload`` as in the protocol."""

    tag: int
    payload: bytes
    request: Request | None = None

    @property
    def error(self) -> str | None:
        """The text of an error response."""
        return self.payload.split(b"\0", 1)[0].decode("utf-8", "replace") if self.tag == ERROR_RESPONSE else None


def encode_request(request: Request, version: int) -> bytes:
    """The payload of one CopyData message."""
    lsns = (request.request_lsn, request.not_modified_since)
    identity = (request.reqid, *lsns) if version == V3 else lsns
    return _HEADERS[version].pack(request.tag, *identity) + _BODIES[request.tag].pack(*request.body)


def parse_request(message: bytes | memoryview, version: int) -> Request:
    """Read a request. Raises ProtocolViolation when the tag is unknown or the length is not exactly right."""
    header = _HEADERS[version]
    if not len(message):
        raise ProtocolViolation("an empty pagestream message")
    tag = message[0]
    body = _BODIES.get(tag)
    if body is None:
        raise ProtocolViolation(f"unknown pagestream request tag {tag}")
    if len(message) != header.size + body.size:
        raise ProtocolViolation(f"pagestream request {_NAMES[tag]} has {len(message)} bytes, not {header.size + body.size}")
    identity = header.unpack_from(message)
    return Request(tag, identity[-2], identity[-1], body.unpack_from(message, header.size), identity[1] if version == V3 else 0)


def response_prefix(request: Request, version: int) -> bytes:
    """What comes before the payload of the answer to a request."""
    tag = _RESPONSE_TAGS[request.tag]
    if version == V2:
        return bytes([tag])
    echo = _V3_ECHO.pack(tag, request.reqid, request.request_lsn, request.not_modified_since)
    return echo + _BODIES[request.tag].pack(*request.body)


def error_response(request: Request, text: str, version: int) -> bytes:
    """The answer to a request that failed."""
    message = text.replace("\0", " ").encode() + b"\0"
    if version == V2:
        return bytes([ERROR_RESPONSE]) + message
    return _V3_ECHO.pack(ERROR_RESPONSE, request.reqid, request.request_lsn, request.not_modified_since) + message


def encode_exists(exists: bool) -> bytes:
    """The payload of an Exists answer."""
    return b"\1" if exists else b"\0"


def encode_nblocks(blocks: int) -> bytes:
    """The payload of an Nblocks answer."""
    return struct.pack("!I", blocks)


def encode_db_size(size_bytes: int) -> bytes:
    """The payload of a DbSize answer."""
    return struct.pack("!q", size_bytes)


def encode_slru_segment(pages: bytes) -> bytes:
    """The payload of a GetSlruSegment answer."""
    return struct.pack("!I", len(pages) // PAGE_SIZE) + pages


def parse_response(message: bytes | memoryview, version: int) -> Response:
    """Read a response. Raises ProtocolViolation when it is malformed."""
    data = bytes(message)
    if not data:
        raise ProtocolViolation("an empty pagestream message")
    tag = data[0]
    if tag != ERROR_RESPONSE and tag not in _REQUEST_OF:
        raise ProtocolViolation(f"unknown pagestream response tag {tag}")
    offset, request = 1, None
    if version == V3:
        body = struct.Struct("") if tag == ERROR_RESPONSE else _BODIES[_REQUEST_OF[tag]]
        offset = _V3_ECHO.size + body.size
        if len(data) < offset:
            raise ProtocolViolation(f"pagestream response {tag} is cut off")
        _, reqid, request_lsn, not_modified_since = _V3_ECHO.unpack_from(data)
        fields = body.unpack_from(data, _V3_ECHO.size)
        request = Request(_REQUEST_OF.get(tag, tag), request_lsn, not_modified_since, fields, reqid)
    payload = data[offset:]
    _check_payload(tag, payload)
    return Response(tag, payload, request)


def _check_payload(tag: int, payload: bytes) -> None:
    if tag == ERROR_RESPONSE:
        good = payload.endswith(b"\0") and payload.count(b"\0") == 1
    elif tag == _RESPONSE_TAGS[GET_SLRU_SEGMENT]:
        good = len(payload) >= 4 and len(payload) == 4 + PAGE_SIZE * int.from_bytes(payload[:4], "big")
    else:
        good = len(payload) == {100: 1, 101: 4, 102: PAGE_SIZE, 104: 8}[tag]
    if not good:
        raise ProtocolViolation(f"pagestream response {tag} has a payload of the wrong length ({len(payload)})")
