"""Durations as Neon's options and config files write them: ``5s``, ``5000ms``, ``15m``, ``1h 30m``."""

import re

from neon_services.ground.errors import ConfigError

_UNITS_MS = {
    "us": 0.001,
    "ms": 1.0,
    "s": 1000.0,
    "sec": 1000.0,
    "m": 60_000.0,
    "min": 60_000.0,
    "h": 3_600_000.0,
    "d": 86_400_000.0,
}
_PART = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)")


def parse_duration_ms(text: str, *, what: str) -> int:
    """A duration in milliseconds. Raises ConfigError naming the option (``what``) and the text."""
    total, position = 0.0, 0
    stripped = text.rstrip()
    while position < len(stripped):
        part = _PART.match(stripped, position)
        if part is None or part[2] not in _UNITS_MS:
            break
        total += float(part[1]) * _UNITS_MS[part[2]]
        position = part.end()
    if not stripped or position != len(stripped):
        raise ConfigError(f"{what}: {text!r} is not a duration (for example 5000ms, 30s or 15m)")
    return round(total)
