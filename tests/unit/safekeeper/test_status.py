"""What the debug dump says about files that change while it looks."""

from pathlib import Path

from neon_services.safekeeper.status import disk_content, wal_last_modified


def test_files_that_vanish_meanwhile_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0\0x\0y\0\0\0")
    (tmp_path / "b").symlink_to(tmp_path / "gone")  # listed, and not there when one looks closer
    (tmp_path / "c").write_bytes(bytes(7))
    (tmp_path / "d").write_bytes(b"")
    found = disk_content(tmp_path)
    assert found is not None
    assert [(f["name"], f["size"], f["start_zeroes"], f["end_zeroes"]) for f in found["files"]] == [
        ("a", 8, 2, 3),
        ("c", 7, 7, 0),
        ("d", 0, 0, 0),
    ]
    assert wal_last_modified(tmp_path) is not None


def test_a_timeline_that_was_just_deleted_has_no_files(tmp_path: Path) -> None:
    assert disk_content(tmp_path / "gone") is None
    assert wal_last_modified(tmp_path / "gone") is None
    (tmp_path / "safekeeper.control").write_bytes(b"x")
    assert wal_last_modified(tmp_path) is None
