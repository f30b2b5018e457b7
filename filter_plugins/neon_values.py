"""Values in the notations that Neon's services read: SCRAM verifiers and TOML.

Invariant: the same input gives the same text, so that a second run changes nothing.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

_ITERATIONS = 4096


def scram_verifier(password: str, salt_source: str) -> str:
    """Postgres's SCRAM-SHA-256 verifier of a password.

    The salt is derived from ``salt_source``, something public that names the role in its cluster: different roles get different
    salts and every run the same one. Passwords are taken as they are; use ASCII, for which SASLprep changes nothing.
    """
    if not password or not password.isascii():
        raise AnsibleFilterError("a role's password must be non-empty ASCII: other characters would need SASLprep")
    salt = hashlib.sha256(f"neon role {salt_source}".encode()).digest()[:16]
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    encoded = (base64.b64encode(value).decode() for value in (salt, stored, server))
    return "SCRAM-SHA-256${}:{}${}:{}".format(_ITERATIONS, *encoded)


def _basic_string(text: str) -> str:
    # A JSON string is a TOML basic string, but for one control character that JSON leaves as it is.
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_value(value: Any) -> str:
    """A TOML value: strings, booleans, numbers, lists and (inline) tables."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value + 0)
    if isinstance(value, str):
        return _basic_string(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    raise AnsibleFilterError(f"{value!r} has no TOML notation: use strings, numbers, booleans, lists and mappings")


def toml_key(key: str) -> str:
    """A TOML key, quoted when it must be."""
    text = str(key)
    return text if text and all(c.isascii() and (c.isalnum() or c in "-_") for c in text) else _basic_string(text)


def toml_document(table: Mapping[str, Any]) -> str:
    """A TOML document with one line per key; tables are written inline."""
    return "".join(f"{toml_key(key)} = {toml_value(value)}\n" for key, value in table.items())


def systemd_argument(word: str) -> str:
    """One word of a unit's command line: quoted, with systemd's own expansions (``%`` and ``$``) switched off."""
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return text if text and all(c.isalnum() or c in "-_./:=@,+%$" for c in text) else f'"{text}"'


def host_port(service: Mapping[str, Any]) -> str:
    """``host:port`` of the Postgres wire of a service of the topology."""
    host = str(service["host"])
    return f"[{host}]:{service['pg_port']}" if ":" in host else f"{host}:{service['pg_port']}"


def spec_roles(roles: list[Mapping[str, Any]], tenant_id: str) -> list[dict[str, Any]]:
    """A compute spec's ``cluster.roles``, with verifiers in place of passwords."""
    return [
        {
            "name": role["name"],
            "encrypted_password": scram_verifier(role["password"], f"{tenant_id}/{role['name']}"),
            "options": None,
        }
        for role in roles
    ]


def spec_settings(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """A compute spec's ``cluster.settings``; everything is a string there, which Postgres takes for any type."""
    for name, value in settings.items():
        if isinstance(value, bool):
            raise AnsibleFilterError(f"setting {name} is {value!r}: quote it as Postgres writes it, such as 'on'")
    return [{"name": name, "value": str(value), "vartype": "string"} for name, value in sorted(settings.items())]


class FilterModule:
    """Gives Ansible the filters by name."""

    def filters(self) -> dict[str, Any]:
        return {
            "scram_verifier": scram_verifier,
            "neon_host_port": host_port,
            "neon_spec_roles": spec_roles,
            "neon_spec_settings": spec_settings,
            "to_toml": toml_document,
            "to_toml_value": toml_value,
            "to_systemd_argument": systemd_argument,
        }
