"""The Postgres wire protocol 3.0, sans-IO: how messages look, for both ends. Sockets are in pgserver.py and pgclient.py.

Every message is ``tag byte | int32 length (counting itself) | body``, big-endian; the first message of a client has no tag.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from neon_services.ground.errors import NeonError, ProtocolViolation

PROTOCOL_3 = 196608
SSL_REQUEST = 80877103
GSSENC_REQUEST = 80877104
CANCEL_REQUEST = 80877102
MAX_STARTUP_BYTES = 10_000
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_LENGTH = struct.Struct("!i")
_HEADER = struct.Struct("!ci")


class ServerError(NeonError):
    """An ErrorResponse: what the server refused, with its SQLSTATE."""

    def __init__(self, sqlstate: str, message: str, severity: str = "ERROR") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.severity = severity


@dataclass(frozen=True, slots=True)
class StartupMessage:
    """The client's first message: its parameters such as ``user``, ``database``, ``options``, ``application_name``."""

    parameters: dict[str, str]

    def options(self) -> dict[str, str]:
        """``key=value`` tokens of the ``options`` parameter; a ``-c`` before a token is optional, a backslash escapes."""
        tokens: list[str] = []
        current: list[str] = []
        text = iter(self.parameters.get("options", ""))
        for char in text:
            if char == "\\":
                current.append(next(text, ""))
            elif char.isspace():
                if current:
                    tokens.append("".join(current))
                    current = []
            else:
                current.append(char)
        if current:
            tokens.append("".join(current))
        found: dict[str, str] = {}
        for token in tokens:
            if token == "-c":
                continue
            name, equals, value = token.removeprefix("-c").partition("=")
            if equals:
                found[name] = value
        return found


def message(tag: bytes, body: bytes = b"") -> bytes:
    """One tagged message."""
    return _HEADER.pack(tag, len(body) + 4) + body


def startup_message(parameters: dict[str, str]) -> bytes:
    """The client's first message."""
    body = b"".join(f"{name}\0{value}\0".encode() for name, value in parameters.items()) + b"\0"
    return struct.pack("!ii", len(body) + 8, PROTOCOL_3) + body


def parse_startup(packet: bytes) -> StartupMessage | int:
    """The first packet without its length: a StartupMessage, or the code of an SSL, GSS or cancel request."""
    if len(packet) < 4:
        raise ProtocolViolation("the startup packet is too short")
    (code,) = _LENGTH.unpack_from(packet)
    if code in (SSL_REQUEST, GSSENC_REQUEST, CANCEL_REQUEST):
        return code
    if code >> 16 != 3:
        raise ProtocolViolation(f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: this server speaks 3.0")
    fields = packet[4:].split(b"\0")
    if len(fields) < 2 or fields[-1] or fields[-2]:
        raise ProtocolViolation("the startup packet has no terminator")
    texts = [field.decode("utf-8", "replace") for field in fields[:-2]]
    if len(texts) % 2:
        raise ProtocolViolation("the startup packet has a name without a value")
    return StartupMessage(dict(zip(texts[::2], texts[1::2], strict=True)))


def split_messages(buffer: memoryview) -> Iterator[tuple[int, memoryview, int]]:
    """Whole tagged messages at the front of the buffer, as (tag, body view, offset after it). Raises ProtocolViolation."""
    offset, end = 0, len(buffer)
    while end - offset >= 5:
        (length,) = _LENGTH.unpack_from(buffer, offset + 1)
        if length < 4 or length > MAX_MESSAGE_BYTES:
            raise ProtocolViolation(f"message {buffer[offset : offset + 1].tobytes()!r} has the impossible length {length}")
        after = offset + 1 + length
        if after > end:
            return
        yield buffer[offset], buffer[offset + 5 : after], after
        offset = after


def cstring(body: bytes | memoryview) -> str:
    """The text before the first NUL."""
    return bytes(body).split(b"\0", 1)[0].decode("utf-8", "replace")


# --- messages of a server -------------------------------------------------------------------------------------------

AUTHENTICATION_OK = message(b"R", struct.pack("!i", 0))
AUTHENTICATION_CLEARTEXT = message(b"R", struct.pack("!i", 3))
READY_FOR_QUERY = message(b"Z", b"I")
COPY_DONE = message(b"c")
COPY_BOTH_RESPONSE = message(b"W", struct.pack("!bh", 0, 0))
COPY_OUT_RESPONSE = message(b"H", struct.pack("!bh", 0, 0))
TEXT_OID, INT4_OID, INT8_OID = 25, 23, 20


def parameter_status(name: str, value: str) -> bytes:
    """A ParameterStatus message."""
    return message(b"S", f"{name}\0{value}\0".encode())


def command_complete(tag: str) -> bytes:
    """A CommandComplete message."""
    return message(b"C", tag.encode() + b"\0")


def error_response(text: str, sqlstate: str = "XX000", severity: str = "ERROR") -> bytes:
    """An ErrorResponse with severity, SQLSTATE and message."""
    clean = text.replace("\0", " ")
    return message(b"E", f"S{severity}\0V{severity}\0C{sqlstate}\0M{clean}\0\0".encode())


def parse_error_response(body: bytes | memoryview) -> ServerError:
    """The error in an ErrorResponse body."""
    fields = {part[:1]: part[1:].decode("utf-8", "replace") for part in bytes(body).split(b"\0") if part}
    return ServerError(fields.get(b"C", "XX000"), fields.get(b"M", "unknown error"), fields.get(b"S", "ERROR"))


def row_description(columns: Sequence[tuple[str, int]]) -> bytes:
    """A RowDescription of (name, type oid) columns in text format."""
    body = struct.pack("!h", len(columns))
    for name, oid in columns:
        size = {INT4_OID: 4, INT8_OID: 8}.get(oid, -1)
        body += name.encode() + b"\0" + struct.pack("!ihihih", 0, 0, oid, size, -1, 0)
    return message(b"T", body)


def data_row(values: Sequence[str | None]) -> bytes:
    """A DataRow of text values."""
    body = [struct.pack("!h", len(values))]
    for value in values:
        if value is None:
            body.append(_LENGTH.pack(-1))
        else:
            encoded = value.encode()
            body += [_LENGTH.pack(len(encoded)), encoded]
    return message(b"D", b"".join(body))


def parse_data_row(body: bytes | memoryview) -> list[str | None]:
    """The text values of a DataRow body."""
    data = bytes(body)
    (count,) = struct.unpack_from("!h", data)
    offset = 2
    values: list[str | None] = []
    for _ in range(count):
        (length,) = _LENGTH.unpack_from(data, offset)
        offset += 4
        if length < 0:
            values.append(None)
        else:
            values.append(data[offset : offset + length].decode("utf-8", "replace"))
            offset += length
    return values


# --- messages of a client -------------------------------------------------------------------------------------------

TERMINATE = message(b"X")


def query(sql: str) -> bytes:
    """A simple Query."""
    return message(b"Q", sql.encode() + b"\0")


def password_message(password: str) -> bytes:
    """A PasswordMessage."""
    return message(b"p", password.encode() + b"\0")


def copy_data(payload: bytes) -> bytes:
    """A CopyData message."""
    return b"d" + _LENGTH.pack(len(payload) + 4) + payload


def copy_data_header(payload_length: int) -> bytes:
    """The five bytes in front of a CopyData payload that is written separately."""
    return b"d" + _LENGTH.pack(payload_length + 4)
