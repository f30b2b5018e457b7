"""Layer file names, exactly Neon's.

``<key_start>-<key_end>__<lsn_start>-<lsn_end>`` is a delta layer, ``<key_start>-<key_end>__<lsn>`` an image layer; keys are
36 and LSNs 16 upper-case hex digits, ends are exclusive. Locally ``-v1-<generation>`` follows, remotely ``-<generation>``
(8 digits).
"""

import re
from dataclasses import dataclass

from neon_services.pageserver.values import KEY_MAX, KEY_MIN, format_key, parse_key

_PATTERN = re.compile(r"([0-9A-F]{36})-([0-9A-F]{36})__([0-9A-F]{16})(?:-([0-9A-F]{16}))?(?:(?:-v1)?-([0-9a-f]{8}))?(?:-v1)?")


@dataclass(frozen=True, slots=True, order=True)
class LayerName:
    """What a layer covers: keys ``[key_start, key_end)``; LSNs ``[lsn_start, lsn_end)``, for an image one LSN."""

    key_start: int
    key_end: int
    lsn_start: int
    lsn_end: int
    is_image: bool = False

    @classmethod
    def delta(cls, key_start: int, key_end: int, lsn_start: int, lsn_end: int) -> "LayerName":
        return cls(key_start, key_end, lsn_start, lsn_end)

    @classmethod
    def level0(cls, lsn_start: int, lsn_end: int) -> "LayerName":
        """The delta layer that a flush writes: all keys."""
        return cls(KEY_MIN, KEY_MAX, lsn_start, lsn_end)

    @classmethod
    def image(cls, key_start: int, key_end: int, lsn: int) -> "LayerName":
        return cls(key_start, key_end, lsn, lsn + 1, True)

    @property
    def is_l0(self) -> bool:
        return not self.is_image and self.key_start == KEY_MIN and self.key_end == KEY_MAX

    def __str__(self) -> str:
        keys = f"{format_key(self.key_start)}-{format_key(self.key_end)}__{self.lsn_start:016X}"
        return keys if self.is_image else f"{keys}-{self.lsn_end:016X}"

    def local(self, generation: int) -> str:
        """The file's name on local disk."""
        return f"{self}-v1-{generation:08x}"

    def remote(self, generation: int) -> str:
        """The last component of the object's key."""
        return f"{self}-{generation:08x}"


def parse_layer_name(text: str) -> tuple[LayerName, int | None]:
    """Read a name: it, and the generation if there is a suffix. Raises ValueError that quotes the text."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"not a layer file name: {text!r}")
    key_start, key_end = parse_key(match[1]), parse_key(match[2])
    lsn_start = int(match[3], 16)
    if match[4] is None:
        name = LayerName.image(key_start, key_end, lsn_start)
    else:
        name = LayerName.delta(key_start, key_end, lsn_start, int(match[4], 16))
    if key_start >= key_end or name.lsn_start >= name.lsn_end:
        raise ValueError(f"layer file name {text!r} has an empty key or LSN range")
    return name, None if match[5] is None else int(match[5], 16)
