"""Reading what HTTP requests to a safekeeper carry; whatever is wrong becomes status 400 and names its field."""

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from neon_services.ground.http import ApiError, optional_field, require_field
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn, parse_lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration

TIMELINE_PATH = "/v1/tenant/{tenant_id}/timeline/{timeline_id}"


def parse_id(kind: Any, text: str, field: str) -> Any:
    """A tenant or timeline id. Raises ApiError 400."""
    try:
        return kind.parse(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


def ttid_of(request: web.Request) -> TenantTimelineId:
    """The timeline that the path names. Raises ApiError 400."""
    return TenantTimelineId(
        parse_id(TenantId, request.match_info["tenant_id"], "tenant_id"),
        parse_id(TimelineId, request.match_info["timeline_id"], "timeline_id"),
    )


def ttid_field(body: dict[str, Any]) -> TenantTimelineId:
    """The timeline that the body names. Raises ApiError 400."""
    return TenantTimelineId(
        parse_id(TenantId, require_field(body, "tenant_id", str), "tenant_id"),
        parse_id(TimelineId, require_field(body, "timeline_id", str), "timeline_id"),
    )


def parse_lsn_field(text: str, field: str) -> Lsn:
    """An LSN. Raises ApiError 400."""
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


def number_field(body: dict[str, Any], name: str, bits: int, default: int | None = None) -> int:
    """An unsigned number of so many bits. Raises ApiError 400."""
    value = require_field(body, name, int) if default is None else optional_field(body, name, int, default)
    if not 0 <= value < 1 << bits:
        raise ApiError(400, f"field {name!r} must be between 0 and {(1 << bits) - 1}, not {value}")
    return value


def mconf_field(value: Any, field: str) -> MembershipConfiguration:
    """A membership configuration. Raises ApiError 400."""
    try:
        return MembershipConfiguration.from_json(value)
    except ValueError as error:
        raise ApiError(400, f"{field}: {error}") from error


def flag_parameter(query: Mapping[str, str], name: str, default: bool = False) -> bool:
    """A query parameter that is true or false. Raises ApiError 400."""
    value = query.get(name)
    if value is None:
        return default
    if value not in ("true", "false"):
        raise ApiError(400, f"query parameter {name!r} must be true or false, not {value!r}")
    return value == "true"
