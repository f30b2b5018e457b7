"""What follows files: a content that could not be taken is tried again, though the files stay as they are."""

import pytest

from neon_services.ground.errors import ConfigError
from neon_services.ground.reload import Reloadable


class Follower(Reloadable):
    def __init__(self) -> None:
        self.content, self.taken, self.refuses = "a", "", False
        super().__init__("--some-file")

    def _read(self) -> str:
        return self.content

    def _take(self, content: str) -> None:
        if self.refuses:
            raise ConfigError("no file descriptor is left")
        self.taken = content


def test_a_content_that_could_not_be_taken_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    follower = Follower()
    follower.content, follower.refuses = "b", True
    follower.reload()
    follower.reload()
    assert follower.taken == "a" and caplog.text.count("not read again") == 1
    follower.refuses = False
    follower.reload()
    assert follower.taken == "b"
