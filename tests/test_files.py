"""A file is there whole or not at all; a full disk is told from other failures."""

import concurrent.futures
import errno
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from pretrain.files import is_out_of_space, replacing, write_text, write_text_once


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:  # noqa: PT012 (it fails half-way)
        temporary.write_text("after")
        raise ZeroDivisionError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
    write_text(path, "after")
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_for_which_there_is_no_room_tells_which_file(tmp_path):
    path = tmp_path / "file"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_text(path, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.filename, is_out_of_space(caught.value)) == (str(path), True)
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_out_of_space():
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "w") as full:
        full.write("content")
    assert is_out_of_space(caught.value)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EDQUOT, True), (errno.EFBIG, True), (errno.EACCES, False), (errno.EIO, False), (None, False)],
)
def test_a_spent_quota_and_a_size_limit_are_out_of_space_and_other_failures_are_not(number, expected):
    assert is_out_of_space(OSError(number, "words")) == expected


def write_number(path_and_number: tuple[Path, int]) -> None:
    write_text_once(path_and_number[0], f"{path_and_number[1]}\n" * 1000)


def test_of_many_that_write_a_file_once_one_does(tmp_path):
    path = tmp_path / "once"
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(write_number, [(path, number) for number in range(40)]))
    lines = path.read_text().splitlines()
    assert len(lines) == 1000
    assert len(set(lines)) == 1
    write_text_once(path, "later")
    assert path.read_text().splitlines() == lines
    assert [one.name for one in tmp_path.iterdir()] == ["once"], "nothing temporary is left"
