"""Damaged tars: where the headers end in disorder is told, and none makes the reader go round for ever."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest

from pretrain.data.index_worker import ScanTask, scan_tar
from pretrain.data.tar_members import tar_members


def write_tar(names: tuple[str, ...], kinds: dict[str, bytes] | None = None) -> bytearray:
    """A tar of members of 600 bytes, so that their headers stand 1536 bytes apart."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.type = (kinds or {}).get(name, tarfile.REGTYPE)
            member.size = 600 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(bytes(600)))
    return bytearray(content.getvalue())


def with_size(content: bytearray, header: int, size: bytes) -> bytearray:
    content[header + 124 : header + 124 + len(size)] = size
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    return content


def damaged(content: bytearray, start: int, end: int, value: int) -> bytearray:
    content[start:end] = bytes([value]) * (end - start)
    return content


NAMES = ("a.mp4", "b.mp4", "c.mp4")
DAMAGES = {
    "negative size": (with_size(write_tar(NAMES), 1536, b"\xff" * 12), 1, "the header at byte 1536 gives a size below"),
    "size far below zero": (
        with_size(write_tar(NAMES), 1536, b"\xff" * 10 + b"\x00\x00"),
        1,
        "gives a size below zero",
    ),
    "no header": (damaged(write_tar(NAMES), 1536, 2048, 7), 1, "the header at byte 1536 is damaged"),
    "a header of zeros": (damaged(write_tar(NAMES), 1536, 2048, 0), 1, "more follows after its end at byte 1536"),
    "no end": (write_tar(NAMES)[: 3 * 1536], 3, "its end is missing"),
    "cut in a member": (write_tar(NAMES)[: 2 * 1536 + 700], 3, "unexpected end of data"),
    "huge size": (with_size(write_tar(NAMES), 1536, b"\x80" + b"\x7f" * 11), 2, "is damaged: OverflowError"),
}


@pytest.mark.parametrize(("content", "found", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_members_come_up_to_the_damage_which_is_told(content, found, words):
    members = tar_members(io.BytesIO(content))
    assert [member.name for member in itertools.islice(members, found)] == list(NAMES[:found])
    with pytest.raises(tarfile.ReadError, match=words):
        next(members)


def test_a_whole_tar_ends_without_a_word():
    assert [member.name for member in tar_members(io.BytesIO(write_tar(NAMES)))] == list(NAMES)


def scanned(tmp_path: Path, content: bytes) -> tuple[list[str], dict[str, str]]:
    (tmp_path / "a.tar").write_bytes(content)
    tar = scan_tar(ScanTask(tmp_path / "a.tar", None))
    return [sample.key for sample in tar.samples], dict(tar.rejected)


def test_the_samples_before_the_damage_are_found_and_the_rest_is_named(tmp_path):
    found, rejected = scanned(tmp_path, damaged(write_tar(NAMES), 1536, 2048, 7))
    assert found == ["a"]
    words = "not a whole tar (the header at byte 1536 is damaged): nothing after its 1 first samples can be found"
    assert rejected == {"": words}


def test_links_are_no_samples_and_are_named_unless_the_sample_has_a_video(tmp_path):
    content = write_tar(("a.mp4", "b.mp4", "a.txt", "folder"), {"b.mp4": b"2", "a.txt": b"2", "folder": b"5"})
    found, rejected = scanned(tmp_path, content)
    assert found == ["a"]
    assert rejected == {"b": "is no file in the tar, but a link or a device"}


def test_a_reason_is_one_line_whatever_the_names(tmp_path):
    _, rejected = scanned(tmp_path, write_tar(("a.x\ny",)))
    assert rejected == {"a": "holds no video, only x\\ny"}
