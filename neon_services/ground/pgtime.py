"""Postgres timestamps: microseconds since 2000-01-01 00:00:00 UTC, as on the wire and in WAL."""

from datetime import UTC, datetime

POSTGRES_EPOCH_US = 946_684_800_000_000  # 2000-01-01 in microseconds since 1970-01-01


def to_postgres_us(unix_us: int) -> int:
    """Microseconds since the Unix epoch to microseconds since the Postgres epoch."""
    return unix_us - POSTGRES_EPOCH_US


def to_datetime(postgres_us: int) -> datetime:
    """A Postgres timestamp as an aware datetime."""
    return datetime.fromtimestamp((postgres_us + POSTGRES_EPOCH_US) / 1e6, tz=UTC)
