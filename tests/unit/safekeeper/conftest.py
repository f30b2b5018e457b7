"""Fixtures about how segments are made."""

import pytest

from neon_services.safekeeper import segments
from neon_services.safekeeper.segments import SCRATCH_NAME


@pytest.fixture
def without_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are made in line, so that the steps are the same in each run."""
    monkeypatch.setattr(segments.SegmentDirectory, "prepare", lambda self, bulk=False: None)


@pytest.fixture
def preparation_in_line(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Segments are made at once when they would be made in the background; for each whether its room was only allocated."""
    made: list[bool] = []

    def prepare(self: segments.SegmentDirectory, *, bulk: bool = False) -> None:
        if not self.disk.exists(self.path / SCRATCH_NAME):
            self._make_scratch(bulk=bulk)
            made.append(bulk)

    monkeypatch.setattr(segments.SegmentDirectory, "prepare", prepare)
    return made
