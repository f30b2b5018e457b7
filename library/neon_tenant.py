#!/usr/bin/python
"""Have a tenant attached to a pageserver."""

from __future__ import annotations

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.neon_http import Api, ApiError

DOCUMENTATION = r"""
module: neon_tenant
short_description: Have a tenant attached to a pageserver
description:
  - Attaches the tenant with the generation that the inventory gives, or changes its configuration in place.
  - Refuses to go back to a lower generation, which would let a stale pageserver write.
options:
  pageserver:
    description: URL of the pageserver's HTTP API.
    type: str
    required: true
  tenant_id:
    description: The tenant, 32 hexadecimal digits.
    type: str
    required: true
  generation:
    description: Attachment generation. Count it up to attach somewhere else.
    type: int
    required: true
  config:
    description: Tenant configuration, by Neon's names.
    type: dict
    default: {}
"""

ARGUMENTS = {
    "pageserver": {"type": "str", "required": True},
    "tenant_id": {"type": "str", "required": True},
    "generation": {"type": "int", "required": True},
    "config": {"type": "dict", "default": {}},
}
ATTACHED = "AttachedSingle"
_PATIENCE_S = 60


class TenantError(Exception):
    """What the inventory asks for must not be done; the message says why."""


def plan(current: dict[str, Any] | None, desired: dict[str, Any]) -> dict[str, Any] | None:
    """The location_config to put, or None when the pageserver has it already.

    ``current`` is the pageserver's answer (None: it does not have the tenant). Raises TenantError for a generation lower than
    the current one.
    """
    if current is None or current.get("mode") == "Detached":
        return desired
    generation = current.get("generation") or 0
    if generation > desired["generation"]:
        raise TenantError(
            f"the pageserver has the tenant in generation {generation}, the inventory says {desired['generation']}: "
            "a generation never goes back, set it to at least that"
        )
    same = (
        current.get("mode") == ATTACHED
        and generation == desired["generation"]
        and _explicit(current.get("tenant_conf")) == desired["tenant_conf"]
    )
    return None if same else desired


def _explicit(config: dict[str, Any] | None) -> dict[str, Any]:
    """What is set of a tenant's configuration; a service may list what is not as null."""
    return {key: value for key, value in (config or {}).items() if value is not None}


def location(generation: int, config: dict[str, Any]) -> dict[str, Any]:
    """The location_config of an unsharded tenant that is attached here and nowhere else."""
    return {
        "mode": ATTACHED,
        "generation": generation,
        "secondary_conf": None,
        "shard_number": 0,
        "shard_count": 0,
        "shard_stripe_size": 0,
        "tenant_conf": config,
    }


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    p = module.params
    api = Api(p["pageserver"])
    path = f"/v1/location_config/{p['tenant_id']}"
    try:
        current = api.find(path)
        desired = plan(current, location(p["generation"], p["config"]))
        if desired and not module.check_mode:
            api.call_patiently("PUT", f"/v1/tenant/{p['tenant_id']}/location_config", desired, patience_s=_PATIENCE_S)
    except (ApiError, TenantError) as error:
        module.fail_json(msg=f"tenant {p['tenant_id']}: {error}")
    module.exit_json(changed=desired is not None, diff={"before": current or {}, "after": desired or current})


if __name__ == "__main__":
    main()
