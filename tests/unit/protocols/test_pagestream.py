"""The pagestream codec: layouts of the protocol, both ends, every prefix."""

import struct

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.protocols import pagestream as ps
from neon_services.protocols.pagestream import Request

BODIES = {
    ps.EXISTS: (1663, 5, 16384, 0),
    ps.NBLOCKS: (1663, 5, 16384, 2),
    ps.GET_PAGE: (1663, 5, 16384, 1, 0xFFFF_FFFE),
    ps.DB_SIZE: (16385,),
    ps.GET_SLRU_SEGMENT: (1, 0x1F),
}
PAYLOADS = {
    ps.EXISTS: ps.encode_exists(True),
    ps.NBLOCKS: ps.encode_nblocks(0x01020304),
    ps.GET_PAGE: bytes(range(256)) * 32,
    ps.DB_SIZE: ps.encode_db_size(1 << 40),
    ps.GET_SLRU_SEGMENT: ps.encode_slru_segment(bytes(2 * 8192)),
}


def example(tag: int) -> Request:
    return Request(tag, 0xFFFF_FFFF_FFFF_FFFF, 0x0169_AD58, BODIES[tag], reqid=0)


@pytest.mark.parametrize("version", [ps.V2, ps.V3])
@pytest.mark.parametrize("tag", BODIES)
def test_requests_are_read_back_and_every_prefix_is_refused(tag: int, version: int) -> None:
    request = example(tag)
    encoded = ps.encode_request(request, version)
    assert ps.parse_request(encoded, version) == request
    assert ps.parse_request(memoryview(encoded), version) == request
    for length in range(len(encoded)):
        with pytest.raises(ProtocolViolation):
            ps.parse_request(encoded[:length], version)
    with pytest.raises(ProtocolViolation):
        ps.parse_request(encoded + b"\0", version)


def test_sizes_and_bytes_of_getpage() -> None:
    request = Request(ps.GET_PAGE, 0x11, 0x22, (1663, 5, 1259, 0, 7), reqid=0x33)
    third = ps.encode_request(request, ps.V3)
    assert third == struct.pack("!BQQQIIIBI", 2, 0x33, 0x11, 0x22, 1663, 5, 1259, 0, 7)
    assert len(third) == 42 and len(ps.encode_request(request, ps.V2)) == 34
    answer = ps.response_prefix(request, ps.V3) + bytes(8192)
    assert len(answer) == 8234
    assert answer[:42] == b"\x66" + third[1:]  # the request is echoed behind the tag
    assert ps.response_prefix(request, ps.V2) == b"\x66"


@pytest.mark.parametrize("version", [ps.V2, ps.V3])
@pytest.mark.parametrize("tag", BODIES)
def test_responses_are_read_back_and_every_prefix_is_refused(tag: int, version: int) -> None:
    request = example(tag)
    encoded = ps.response_prefix(request, version) + PAYLOADS[tag]
    response = ps.parse_response(encoded, version)
    assert (response.payload, response.error) == (PAYLOADS[tag], None)
    assert response.tag == {ps.EXISTS: 100, ps.NBLOCKS: 101, ps.GET_PAGE: 102, ps.DB_SIZE: 104, ps.GET_SLRU_SEGMENT: 105}[tag]
    if version == ps.V3:
        assert response.request == request
    for length in [*range(min(len(encoded), 64)), len(encoded) - 1, len(encoded) + 1]:
        with pytest.raises(ProtocolViolation):
            ps.parse_response((encoded + b"\0")[:length], version)


@pytest.mark.parametrize("version", [ps.V2, ps.V3])
def test_errors(version: int) -> None:
    request = example(ps.GET_PAGE)
    encoded = ps.error_response(request, "Not found: relation\0 x", version)
    response = ps.parse_response(encoded, version)
    assert (response.tag, response.error) == (103, "Not found: relation  x")
    for length in range(len(encoded)):
        with pytest.raises(ProtocolViolation):
            ps.parse_response(encoded[:length], version)


def test_unknown_tags() -> None:
    with pytest.raises(ProtocolViolation, match="unknown pagestream request tag 99"):
        ps.parse_request(bytes([99]) + bytes(40), ps.V3)
    with pytest.raises(ProtocolViolation, match="unknown pagestream response tag 1"):
        ps.parse_response(b"\x01", ps.V2)
