"""The messages of the storage broker's gRPC interface (package ``storage_broker``), described at run time.

The wire format is Neon's ``broker.proto``; the classes are made from descriptors, so nothing is generated and no compiler is
needed. Attribute access on them is dynamic: the tables below are their only documentation.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, empty_pb2, message_factory
from google.protobuf.message import DecodeError

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId

PACKAGE = "storage_broker"
SERVICE = f"{PACKAGE}.BrokerService"

UNKNOWN = 0
SAFEKEEPER_TIMELINE_INFO = 2
SAFEKEEPER_DISCOVERY_REQUEST = 3
SAFEKEEPER_DISCOVERY_RESPONSE = 4

_SCALARS = {"u64": "TYPE_UINT64", "bool": "TYPE_BOOL", "bytes": "TYPE_BYTES", "string": "TYPE_STRING"}

# message -> fields as (number, name, type, modifier); a modifier is "", "optional", "repeated" or "oneof NAME"
_MESSAGES: dict[str, list[tuple[int, str, str, str]]] = {
    "TenantTimelineId": [(1, "tenant_id", "bytes", ""), (2, "timeline_id", "bytes", "")],
    "SubscribeSafekeeperInfoRequest": [
        (1, "all", ".google.protobuf.Empty", "oneof subscription_key"),
        (2, "tenant_timeline_id", "TenantTimelineId", "oneof subscription_key"),
    ],
    "SafekeeperTimelineInfo": [
        (1, "safekeeper_id", "u64", ""),
        (2, "tenant_timeline_id", "TenantTimelineId", ""),
        (3, "last_log_term", "u64", ""),
        (4, "flush_lsn", "u64", ""),
        (5, "commit_lsn", "u64", ""),
        (6, "backup_lsn", "u64", ""),
        (7, "remote_consistent_lsn", "u64", ""),
        (8, "peer_horizon_lsn", "u64", ""),
        (9, "local_start_lsn", "u64", ""),
        (10, "safekeeper_connstr", "string", ""),
        (11, "availability_zone", "string", "optional"),
        (12, "term", "u64", ""),
        (13, "http_connstr", "string", ""),
        (14, "standby_horizon", "u64", ""),
        (15, "https_connstr", "string", "optional"),
    ],
    "FilterTenantTimelineId": [(1, "enabled", "bool", ""), (2, "tenant_timeline_id", "TenantTimelineId", "")],
    "TypeSubscription": [(1, "type", "MessageType", "")],
    "SubscribeByFilterRequest": [
        (1, "types", "TypeSubscription", "repeated"),
        (2, "tenant_timeline_id", "FilterTenantTimelineId", "optional"),
    ],
    "SafekeeperDiscoveryRequest": [(1, "tenant_timeline_id", "TenantTimelineId", "")],
    "SafekeeperDiscoveryResponse": [
        (1, "safekeeper_id", "u64", ""),
        (2, "tenant_timeline_id", "TenantTimelineId", ""),
        (3, "commit_lsn", "u64", ""),
        (4, "safekeeper_connstr", "string", ""),
        (5, "availability_zone", "string", "optional"),
        (6, "standby_horizon", "u64", ""),
    ],
    "TypedMessage": [
        (1, "type", "MessageType", ""),
        (2, "safekeeper_timeline_info", "SafekeeperTimelineInfo", "optional"),
        (3, "safekeeper_discovery_request", "SafekeeperDiscoveryRequest", "optional"),
        (4, "safekeeper_discovery_response", "SafekeeperDiscoveryResponse", "optional"),
    ],
}
_MESSAGE_TYPES = {
    "UNKNOWN": UNKNOWN,
    "SAFEKEEPER_TIMELINE_INFO": SAFEKEEPER_TIMELINE_INFO,
    "SAFEKEEPER_DISCOVERY_REQUEST": SAFEKEEPER_DISCOVERY_REQUEST,
    "SAFEKEEPER_DISCOVERY_RESPONSE": SAFEKEEPER_DISCOVERY_RESPONSE,
}
#: The field of TypedMessage that carries each type.
PAYLOAD_FIELDS = {
    SAFEKEEPER_TIMELINE_INFO: "safekeeper_timeline_info",
    SAFEKEEPER_DISCOVERY_REQUEST: "safekeeper_discovery_request",
    SAFEKEEPER_DISCOVERY_RESPONSE: "safekeeper_discovery_response",
}


def _describe_field(message: Any, number: int, name: str, kind: str, modifier: str) -> None:
    field = message.field.add(name=name, number=number, json_name=name)
    field.label = field.LABEL_REPEATED if modifier == "repeated" else field.LABEL_OPTIONAL
    if kind in _SCALARS:
        field.type = getattr(field, _SCALARS[kind])
    elif kind == "MessageType":
        field.type, field.type_name = field.TYPE_ENUM, f".{PACKAGE}.MessageType"
    else:
        field.type, field.type_name = field.TYPE_MESSAGE, kind if kind.startswith(".") else f".{PACKAGE}.{kind}"
    oneof = f"_{name}" if modifier == "optional" else modifier.removeprefix("oneof ") if modifier.startswith("oneof ") else ""
    if oneof:
        names = [declared.name for declared in message.oneof_decl]
        if oneof not in names:
            message.oneof_decl.add(name=oneof)
            names.append(oneof)
        field.oneof_index = names.index(oneof)
        field.proto3_optional = modifier == "optional"


def _make_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="storage_broker.proto", package=PACKAGE, syntax="proto3", dependency=["google/protobuf/empty.proto"]
    )
    enum = file.enum_type.add(name="MessageType")
    for name, number in _MESSAGE_TYPES.items():
        enum.value.add(name=name, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _describe_field(message, *field)
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES}


_CLASSES = _make_classes()
Empty: Any = empty_pb2.Empty
TenantTimelineIdMessage: Any = _CLASSES["TenantTimelineId"]
SubscribeSafekeeperInfoRequest: Any = _CLASSES["SubscribeSafekeeperInfoRequest"]
SafekeeperTimelineInfo: Any = _CLASSES["SafekeeperTimelineInfo"]
FilterTenantTimelineId: Any = _CLASSES["FilterTenantTimelineId"]
TypeSubscription: Any = _CLASSES["TypeSubscription"]
SubscribeByFilterRequest: Any = _CLASSES["SubscribeByFilterRequest"]
SafekeeperDiscoveryRequest: Any = _CLASSES["SafekeeperDiscoveryRequest"]
SafekeeperDiscoveryResponse: Any = _CLASSES["SafekeeperDiscoveryResponse"]
TypedMessage: Any = _CLASSES["TypedMessage"]


def encode_ttid(ttid: TenantTimelineId) -> Any:
    """The pair of ids as a message."""
    return TenantTimelineIdMessage(tenant_id=ttid.tenant_id.raw, timeline_id=ttid.timeline_id.raw)


def decode_ttid(message: Any) -> TenantTimelineId:
    """The pair of ids in a TenantTimelineId message. Raises ProtocolViolation when an id has not 16 bytes."""
    try:
        return TenantTimelineId(TenantId(message.tenant_id), TimelineId(message.timeline_id))
    except ValueError as error:
        raise ProtocolViolation(f"tenant_timeline_id: {error}") from error


def ttid_of(message: Any) -> TenantTimelineId:
    """The ids that an info, a request or a response is about. Raises ProtocolViolation when missing or malformed."""
    if not message.HasField("tenant_timeline_id"):
        raise ProtocolViolation("tenant_timeline_id is missing")
    return decode_ttid(message.tenant_timeline_id)


def typed(payload: Any) -> Any:
    """Wrap an info, a discovery request or a discovery response in a TypedMessage of its type."""
    for number, field in PAYLOAD_FIELDS.items():
        if payload.DESCRIPTOR is TypedMessage.DESCRIPTOR.fields_by_name[field].message_type:
            return TypedMessage(type=number, **{field: payload})
    raise TypeError(f"{payload.DESCRIPTOR.name} is not carried by TypedMessage")


def payload_of(message: Any) -> Any:
    """What a TypedMessage carries. Raises ProtocolViolation when its type is unknown or the payload of it is missing."""
    field = PAYLOAD_FIELDS.get(message.type)
    if field is None:
        raise ProtocolViolation(f"type {message.type} is not a type of message that can be published")
    if not message.HasField(field):
        raise ProtocolViolation(f"a message of type {message.type} must carry {field}")
    return getattr(message, field)


def parse(message_class: Any, data: bytes) -> Any:
    """Decode a message. Raises ProtocolViolation when the bytes are not one."""
    try:
        return message_class.FromString(data)
    except DecodeError as error:
        raise ProtocolViolation(f"not a {message_class.DESCRIPTOR.name}: {error}") from error
