"""The status of a compute and which changes of it are legal: a pure state machine."""

from datetime import UTC, datetime
from enum import StrEnum

from neon_services.ground.errors import NeonError


class Status(StrEnum):
    """Neon's status values."""

    EMPTY = "empty"
    CONFIGURATION_PENDING = "configuration_pending"
    INIT = "init"
    RUNNING = "running"
    CONFIGURATION = "configuration"
    FAILED = "failed"
    TERMINATION_PENDING_FAST = "termination_pending_fast"
    TERMINATION_PENDING_IMMEDIATE = "termination_pending_immediate"
    TERMINATED = "terminated"


TERMINATING = frozenset({Status.TERMINATION_PENDING_FAST, Status.TERMINATION_PENDING_IMMEDIATE, Status.TERMINATED})
_TERMINATE = frozenset({Status.TERMINATION_PENDING_FAST, Status.TERMINATION_PENDING_IMMEDIATE})
_NEXT: dict[Status, frozenset[Status]] = {
    Status.EMPTY: frozenset({Status.CONFIGURATION_PENDING, Status.FAILED}) | _TERMINATE,
    Status.CONFIGURATION_PENDING: frozenset({Status.INIT, Status.CONFIGURATION, Status.FAILED}) | _TERMINATE,
    Status.INIT: frozenset({Status.RUNNING, Status.FAILED, Status.TERMINATED}) | _TERMINATE,
    Status.RUNNING: frozenset({Status.CONFIGURATION_PENDING, Status.FAILED, Status.TERMINATED}) | _TERMINATE,
    Status.CONFIGURATION: frozenset({Status.RUNNING, Status.FAILED, Status.TERMINATED}) | _TERMINATE,
    Status.FAILED: frozenset({Status.TERMINATED}) | _TERMINATE,
    Status.TERMINATION_PENDING_FAST: frozenset({Status.TERMINATED, Status.TERMINATION_PENDING_IMMEDIATE, Status.FAILED}),
    Status.TERMINATION_PENDING_IMMEDIATE: frozenset({Status.TERMINATED, Status.FAILED}),
    Status.TERMINATED: frozenset(),
}


class WrongStatus(NeonError):
    """The request does not fit the compute's status."""


class ComputeStatus:
    """The current status and, when it is ``failed``, why."""

    def __init__(self, start_time: datetime | None = None) -> None:
        self.start_time = start_time or datetime.now(UTC)
        self.current = Status.INIT
        self.error: str | None = None
        self.last_active: datetime | None = None

    def change(self, status: Status, error: str | None = None) -> None:
        """Go to another status. Raises WrongStatus when that is not possible from here."""
        if status not in _NEXT[self.current]:
            raise WrongStatus(f"invalid compute status {self.current.value}: it cannot become {status.value}")
        self.current = status
        self.error = error

    def describe(self, tenant: str, timeline: str) -> dict[str, str | None]:
        """The body of ``GET /status``."""
        return {
            "start_time": self.start_time.isoformat().replace("+00:00", "Z"),
            "tenant": tenant,
            "timeline": timeline,
            "status": self.current.value,
            "last_active": self.last_active.isoformat().replace("+00:00", "Z") if self.last_active else None,
            "error": self.error,
        }
