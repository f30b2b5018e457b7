"""The OpenAPI 3 document of the safekeeper's HTTP API, in Neon's shapes. ``GET /v1/openapi.json`` gives it out.

Invariant (kept by a test): it names every route of the application, and no other. Unknown fields in bodies are ignored,
because Neon's clients of other versions send them.
"""

from typing import Any

from neon_services import __version__
from neon_services.ground.debug_http import MAX_FREQUENCY_HZ, MAX_SECONDS
from neon_services.protocols.safekeeper_messages import MAX_MEMBERS
from neon_services.safekeeper.http_access import Needs, needs
from neon_services.safekeeper.http_fields import TIMELINE_PATH
from neon_services.safekeeper.pull_timeline import MAX_HOSTS

Schema = dict[str, Any]

U16, U32, U64 = ({"type": "integer", "minimum": 0, "maximum": (1 << bits) - 1} for bits in (16, 32, 64))
TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
ID: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{32}$", "description": "32 hexadecimal digits"}
LSN: Schema = {"type": "string", "pattern": "^[0-9a-fA-F]{1,8}/[0-9a-fA-F]{1,8}$", "description": "position in the WAL: X/X"}
ANYTHING: Schema = {"type": "object"}


def _object(properties: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object; what is optional may also be null."""
    nullable = {name: {"anyOf": [schema, NULL]} for name, schema in (optional or {}).items()}
    return {"type": "object", "properties": {**properties, **nullable}, "required": list(properties)}


def _list(item: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": item, **limits}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_MEMBER = _object({"id": U64, "host": {"type": "string", "minLength": 1, "maxLength": 255}, "pg_port": U16})
_MEMBERS = _list(_ref("SafekeeperId"), maxItems=MAX_MEMBERS)
_TERM_HISTORY = _list(_object({"term": U64, "lsn": LSN}))
_LSNS = ("flush_lsn", "commit_lsn", "backup_lsn", "peer_horizon_lsn", "remote_consistent_lsn", "local_start_lsn")
_PEER = _object(
    {
        **dict.fromkeys(("sk_id", "term", "last_log_term"), U64),
        **dict.fromkeys(("flush_lsn", "commit_lsn", "local_start_lsn"), LSN),
        "pg_connstr": TEXT,
        "http_connstr": TEXT,
    },
    {"https_connstr": TEXT},
)

SCHEMAS: dict[str, Schema] = {
    "Error": _object({"msg": TEXT}),
    "SafekeeperId": _MEMBER,
    "Configuration": _object({"generation": U32, "members": _MEMBERS}, {"new_members": _MEMBERS}),
    "TimelineCreateRequest": _object(
        {"tenant_id": ID, "timeline_id": ID, "mconf": _ref("Configuration"), "pg_version": U32, "start_lsn": LSN},
        {"system_id": U64, "wal_seg_size": U32, "commit_lsn": LSN},
    ),
    "TimelineStatus": _object(
        {
            "tenant_id": ID,
            "timeline_id": ID,
            "mconf": _ref("Configuration"),
            "acceptor_state": _object({"term": U64, "epoch": U64, "term_history": _TERM_HISTORY}),
            "pg_info": _object({"pg_version": U32, "system_id": U64, "wal_seg_size": U32}),
            **dict.fromkeys((*_LSNS, "timeline_start_lsn"), LSN),
            "peers": _list(_PEER),
            "walsenders": _list(ANYTHING),
            "walreceivers": _list(_object({"conn_id": U64, "status": {"enum": ["Voting", "Streaming"]}})),
        }
    ),
    "MembershipSwitched": _object(
        {
            "previous_conf": _ref("Configuration"),
            "current_conf": _ref("Configuration"),
            "last_log_term": U64,
            "flush_lsn": LSN,
        }
    ),
    "Deleted": _object({"dir_existed": BOOLEAN}),
    "PullTimelineRequest": _object(
        {
            "tenant_id": ID,
            "timeline_id": ID,
            "http_hosts": _list({"type": "string", "pattern": "^https?://"}, minItems=1, maxItems=MAX_HOSTS),
        },
        {"mconf": _ref("Configuration"), "require_all_hosts": BOOLEAN},
    ),
    "PeerInfo": _object(
        dict.fromkeys(("commit_lsn", "backup_lsn", "remote_consistent_lsn", "peer_horizon_lsn"), LSN),
        {"term": U64, "last_log_term": U64, "flush_lsn": LSN, "local_start_lsn": LSN},
    ),
}


def _parameter(name: str, where: str, schema: Schema, *, required: bool = False) -> Schema:
    return {"name": name, "in": where, "required": required or where == "path", "schema": schema}


_PATH_PARAMETERS = {"tenant_id": ID, "timeline_id": ID, "source_timeline_id": ID, "destination_id": U64}
_FLAG: Schema = {"enum": ["true", "false"]}


class _Operations:
    """Collects the document's paths."""

    def __init__(self) -> None:
        self.paths: dict[str, dict[str, Any]] = {}

    def add(
        self,
        method: str,
        path: str,
        summary: str,
        answer: Schema,
        *,
        body: Schema | None = None,
        body_required: bool = True,
        query: tuple[Schema, ...] = (),
        errors: tuple[int, ...] = (),
        content: str = "application/json",
    ) -> None:
        """One operation. Bad input (400) and unexpected failures (500, 503) are possible everywhere."""
        parameters = [_parameter(n, "path", schema) for n, schema in _PATH_PARAMETERS.items() if "{" + n + "}" in path]
        open_to_all = needs(method.upper(), path) is Needs.NOTHING
        tokens = () if open_to_all else (401, 403)
        codes = sorted({400, 500, 503, *errors, *tokens, *((413,) if body is not None else ())})
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": f"{method}{path}".replace("/", "_").replace("{", "").replace("}", "").replace(".", "_"),
            "parameters": [*parameters, *query],
            "security": [] if open_to_all else [{"token": []}],
            "responses": {
                "200": {"description": "done", "content": {content: {"schema": answer}}},
                **{str(code): {"$ref": f"#/components/responses/Error{code}"} for code in codes},
            },
        }
        if not open_to_all:
            operation["description"] = (
                f"Needs {(needs(method.upper(), path) or Needs.SAFEKEEPER).value}, if tokens are checked."
            )
        if body is not None:
            operation["requestBody"] = {"required": body_required, "content": {"application/json": {"schema": body}}}
        self.paths.setdefault(path, {})[method] = operation


def _paths() -> dict[str, dict[str, Any]]:
    add = (operations := _Operations()).add
    found = (404,)
    latest = (_parameter("use_latest", "query", _FLAG),)
    add("get", "/metrics", "Metrics", TEXT, query=latest, content="text/plain")
    add("get", "/v1/openapi.json", "This document", ANYTHING)
    pprof = _parameter("format", "query", {"enum": ["pprof"]})
    cpu = (
        pprof,
        _parameter("seconds", "query", {"type": "integer", "minimum": 1, "maximum": MAX_SECONDS}),
        _parameter("frequency", "query", {"type": "integer", "minimum": 1, "maximum": MAX_FREQUENCY_HZ}),
        _parameter("force", "query", _FLAG),
    )
    binary = "application/octet-stream"
    add("get", "/profile/cpu", "Where processor time goes, as gzipped pprof", TEXT, query=cpu, errors=(409,), content=binary)
    add("get", "/profile/heap", "What memory holds, as gzipped pprof", TEXT, query=(pprof,), errors=(412,), content=binary)
    body = _list(_object({"name": TEXT, "actions": TEXT}))
    add("put", "/v1/failpoints", "Set failpoints, in processes that were started for tests", NULL, body=body)
    add("get", "/v1/status", "Who I am, and why WAL is refused, if it is", _object({"id": U64}, {"wal_refused": TEXT}))
    add("get", "/v1/utilization", "How much there is here", _object({"timeline_count": U64}))
    usage = _object({"data_dir": TEXT, "capacity_bytes": U64, "usage_bytes": U64})
    add("get", "/v1/debug/filesystem_usage", "The file system of the data directory", usage)
    flags = ("dump_all", "dump_control_file", "dump_memory", "dump_disk_content", "dump_term_history", "dump_wal_last_modified")
    query = (
        *(_parameter(name, "query", _FLAG) for name in flags),
        _parameter("tenant_id", "query", ID),
        _parameter("timeline_id", "query", ID),
    )
    dump = _object(
        {"start_time": TEXT, "finish_time": TEXT, "timelines": _list(ANYTHING), "timelines_count": U64, "config": ANYTHING}
    )
    add("get", "/v1/debug_dump", "Everything known about timelines", dump, query=query)
    create = _ref("TimelineCreateRequest")
    add("post", "/v1/tenant/timeline", "Create a timeline; an existing one is fine", NULL, body=create, errors=(403, 409, 412))
    add("get", "/v1/tenant/timeline", "All timelines", _list(_object({"tenant_id": ID, "timeline_id": ID})))
    local = (_parameter("only_local", "query", _FLAG),)
    removed = {"type": "object", "additionalProperties": _ref("Deleted")}
    add("delete", "/v1/tenant/{tenant_id}", "Delete a tenant's timelines", removed, query=local)
    add("get", TIMELINE_PATH, "One timeline", _ref("TimelineStatus"), errors=found)
    add("delete", TIMELINE_PATH, "Delete a timeline", _ref("Deleted"), query=local)
    conf = _ref("Configuration")
    errors = (403, 404, 409)
    add("put", TIMELINE_PATH + "/membership", "Follow a newer membership", _ref("MembershipSwitched"), body=conf, errors=errors)
    add("put", TIMELINE_PATH + "/exclude", "Forget a timeline of others", _ref("Deleted"), body=conf, errors=(403, 409))
    bumped, bump = _object({"previous_term": U64, "current_term": U64}), _object({}, {"term": U64})
    path = TIMELINE_PATH + "/term_bump"
    add("post", path, "Raise the term", bumped, body=bump, body_required=False, errors=(404, 412))
    add("post", TIMELINE_PATH + "/checkpoint", "Save the control file", NULL, errors=found)
    lsns = tuple(_parameter(name, "query", LSN, required=True) for name in ("from_lsn", "until_lsn"))
    add("get", TIMELINE_PATH + "/digest", "SHA-256 of a range of WAL", _object({"sha256": TEXT}), query=lsns, errors=found)
    path = TIMELINE_PATH + "/backup_partial_reset"
    add("post", path, "Delete the partial segments in object storage", _list(TEXT), errors=(404, 412))
    path = TIMELINE_PATH + "/snapshot/{destination_id}"
    add("get", path, "A copy as a tar stream", TEXT, errors=(404, 412), content="application/octet-stream")
    pulled = _object({}, {"safekeeper_host": TEXT})
    add(
        "post",
        "/v1/pull_timeline",
        "Become a copy of a member",
        pulled,
        body=_ref("PullTimelineRequest"),
        errors=(403, 409, 412),
    )
    copy = _object({"target_timeline_id": ID, "until_lsn": LSN})
    path = "/v1/tenant/{tenant_id}/timeline/{source_timeline_id}/copy"
    add("post", path, "Copy a timeline up to a position", NULL, body=copy, errors=(404, 409, 412))
    patch = _object({"updates": ANYTHING, "apply_fields": _list(TEXT)})
    patched = _object({"old_control_file": ANYTHING, "new_control_file": ANYTHING})
    add("patch", TIMELINE_PATH + "/control_file", "Change fields of the control file", patched, body=patch, errors=found)
    path = "/v1/record_safekeeper_info/{tenant_id}/{timeline_id}"
    add("post", path, "What a peer would say through the broker", NULL, body=_ref("PeerInfo"), errors=found)
    return operations.paths


_ERRORS = {
    400: "the request is wrong; msg names the field",
    401: "no token, or one that is not valid",
    403: "the token does not allow it; or this safekeeper is not a member, or still is one",
    404: "the timeline is not here",
    409: "a newer generation, or a deletion, forbids it",
    412: "the timelines here or at the other members are not ready for it",
    413: "the body is too long",
    500: "a failure of this safekeeper, or a broken timeline",
    503: "the timeline or the process is shutting down",
}


def document() -> dict[str, Any]:
    """The whole document."""
    error = {"application/json": {"schema": _ref("Error")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Safekeeper", "version": __version__, "description": "HTTP API of a safekeeper"},
        "paths": _paths(),
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "EdDSA; claims scope (safekeeperdata or tenant), tenant_id, exp",
                }
            },
            "responses": {f"Error{code}": {"description": text, "content": error} for code, text in _ERRORS.items()},
        },
    }
