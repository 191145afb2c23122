"""300 files damaged at random, the same each time: nothing crashes, hangs or shows a traceback, and all is named.

100 tars, as others made them, go through `tubelet index`; 50 `index.json` and 50 `.idx`, whose hashes fit, through
opening, reading and `tubelet check`; 100 clips, inside an intact tar whose checksums fit, through `tubelet check`.
"""

import dataclasses
import hashlib
import io
import json
import math
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from pretrain.data.shard_writer import PackedSample, write_shard
from pretrain.data.shards import ShardSet
from pretrain.data.transcode import Transcoded
from pretrain.errors import BadSample, Refused
from tests.videos import make_video

TARS = CLIPS = 100
INDEXES = 50  # of either kind
LIMIT_S = 300  # for any one command: far above what it takes, also on a busy machine


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Transcoded:
    path = make_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=6, height=32, width=32, options={"bf": "0"})
    return Transcoded(path.read_bytes(), 6, 12.0, 32, 32)


def run(capsys, *arguments: object) -> tuple[int, str]:
    """Runs a command; returns its exit code, which says that it ended by itself, and what it said."""
    capsys.readouterr()
    start_s = time.monotonic()
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in said.out + said.err
    assert time.monotonic() - start_s < LIMIT_S
    return code, said.err


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flips bits, cuts, drops, doubles or overwrites stretches."""
    result = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        kind = draw.randrange(5)
        start = draw.randrange(len(result)) if result else 0
        end = min(len(result), start + draw.choice((1, 8, 100, 512, 2000)))
        if kind == 0:
            for _ in range(draw.choice((1, 4, 40))):
                if result:
                    result[draw.randrange(len(result))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del result[start:]
        elif kind == 2:
            del result[start:end]
        elif kind == 3:
            result[end:end] = result[start:end]
        else:
            result[start:end] = draw.randbytes(end - start)
    return bytes(result)


def mutated_headers(content: bytes, draw: random.Random) -> bytes:
    """Changes fields of a tar's headers, and the checksums so that they fit."""
    result = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        headers = [member.offset for member in tar]
    for header in draw.sample(headers, draw.choice((1, 2, len(headers)))):
        kind = draw.randrange(4)
        if kind == 0:  # the size: negative, huge, no number, another one
            size = draw.choice((b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"abc", b"%011o\0" % 999))
            result[header + 124 : header + 124 + len(size)] = size
        elif kind == 1:  # the kind of member: links, folders, sparse files, long names, extended headers
            result[header + 156] = draw.choice(b"123456789SLKxgXN\0")
        elif kind == 2:  # the name
            name = draw.choice((b"../../etc/x.mp4", b"\xff\xfe.mp4", b"/", b"a" * 100, b"\0" * 100, b"a\nb\xff.x\n"))
            result[header : header + len(name)] = name
        else:
            place = header + draw.randrange(512)
            result[place] = draw.randrange(256)
        result[header + 148 : header + 156] = b" " * 8
        result[header + 148 : header + 156] = b"%06o\0 " % sum(result[header : header + 512])
    return bytes(result)


def samples_of(tar: Path) -> set[str]:
    with tarfile.open(tar) as opened:
        return {name.partition(".")[0] for name in opened.getnames()}


def test_damaged_tars_are_indexed_as_far_as_they_go_and_the_rest_is_named(clip, tmp_path, capsys):
    draw = random.Random(0)
    (tmp_path / "tars").mkdir()
    for number in range(TARS):
        content = io.BytesIO()
        with tarfile.open(
            fileobj=content, mode="w", format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
        ) as tar:
            for key in range(3):
                for suffix, member in (("cls", b"0"), ("mp4", clip.video)):
                    described = tarfile.TarInfo(f"{'long' * 30 if key == 1 else 'key'}-{number}-{key}.{suffix}")
                    described.size = len(member)
                    tar.addfile(described, io.BytesIO(member))
        mutate = draw.choice((mutated_bytes, mutated_headers))
        (tmp_path / f"tars/{number:03d}.tar").write_bytes(mutate(content.getvalue(), draw))
    code, said = run(capsys, "index", tmp_path / "tars", "--out", tmp_path / "out", "--jobs", 1, "--stall-s", 20)
    assert code == 0, said
    shards = ShardSet.open(tmp_path / "out")
    indexed = {entry.name: entry.samples for entry in shards.shards}
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    named = {report["source"].split("/")[0] for report in rejected}
    assert all(report["reason"] and "\n" not in report["reason"] for report in rejected)
    silent = [path.name for path in sorted((tmp_path / "tars").iterdir()) if indexed.get(path.name, 0) < 3]
    assert set(silent) <= named, "a tar that lost a sample is named"
    assert 100 < shards.samples < 3 * TARS
    for number in range(shards.samples):
        assert shards.read(number).key


VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: None,
    lambda draw: draw.choice((True, "", "text", "../../x.tar", "a\0b", "\ud800", "x" * 5000)),
    lambda draw: draw.choice((-1, 0, 1, 3, 10**18, -(10**30), 10**400)),
    lambda draw: draw.choice((0.5, -0.0, math.nan, math.inf, -math.inf, 1e308, 1e-320)),
    lambda draw: draw.choice(([], {}, [[]], [None], [1, "a"], {"name": 3})),
)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """Changes one place, somewhere: another value, another type, one more or one less."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = draw.choice(list(places))
        kind = draw.randrange(8)
        if kind == 0:
            del value[place]
        elif kind == 1 and isinstance(value, dict):
            value[f"{place}2"] = value[place]
        elif kind == 1:
            value.append(value[place])
        else:
            value[place] = mutated_json(value[place], draw)
        return value
    return draw.choice(VALUES)(draw)


def mutated_index(content: bytes, draw: random.Random) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return mutated_bytes(content, draw)
    if kind == 1 and draw.random() < 0.3:
        depth = 100_000
        return b'{"keys":' + b"[" * depth + b"]" * depth + b"}"
    value = json.loads(content)
    for _ in range(draw.choice((1, 1, 3))):
        value = mutated_json(value, draw)
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def small_set(clip, tmp_path_factory) -> Path:
    """One shard of four samples in two classes."""
    folder = tmp_path_factory.mktemp("small") / "shards"
    folder.mkdir()
    samples = [PackedSample(f"key-{number}", f"{number}.mp4", number % 2, clip) for number in range(4)]
    write_set(folder, samples)
    return folder


def write_set(folder: Path, samples: list[PackedSample]) -> None:
    entry = write_shard(folder / "shard-000000.tar", samples)
    content = {
        "format_version": 1,
        "classes": ["a", "b"],
        "frame_rate": None,
        "short_side": 32,
        "resampled": False,
        "samples": len(samples),
        "shards": [dataclasses.asdict(entry)],
    }
    (folder / "index.json").write_text(json.dumps(content))


def read_all(folder: Path) -> str | None:
    """Opens and reads a set as the loader does; returns why it, or a sample, is refused."""
    try:
        shards = ShardSet.open(folder)
        shards.labels()
        for number in range(shards.samples):
            sample = shards.read(number)
            assert sample.frames / sample.frame_rate > 0
            assert sample.label in (None, *range(len(shards.classes)))
            assert sample.metadata["frames"]
    except (Refused, BadSample) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["index.json", "shard-000000.idx"])
def test_damaged_indexes_are_refused_by_name_or_do_no_harm(small_set, tmp_path, capsys, name):
    draw = random.Random(name)
    refused = 0
    for number in range(INDEXES):
        folder = Path(shutil.copytree(small_set, tmp_path / f"set-{number}"))
        content = mutated_index((folder / name).read_bytes(), draw)
        (folder / name).write_bytes(content)
        if name.endswith(".idx"):
            described = json.loads((folder / "index.json").read_text())
            described["shards"][0]["index_sha256"] = hashlib.sha256(content).hexdigest()
            (folder / "index.json").write_text(json.dumps(described))
        why = read_all(folder)
        if why is None:
            continue
        refused += 1
        assert why.startswith(f"{folder}"), why
        assert ";" in why
        assert "\n" not in why
        assert len(why) < 500
        code, said = run(capsys, "check", folder, "--jobs", 1, "--decode", "none")
        assert code in (1, 2)
        assert name in said or "shard-000000" in said or Path(why.split(": ")[0]).name in said
    assert refused > INDEXES / 2


def test_damaged_clips_in_intact_tars_cost_themselves_alone(clip, tmp_path, capsys):
    draw = random.Random(2)
    videos = [mutated_bytes(clip.video, draw) for _ in range(CLIPS)]
    samples = [
        PackedSample(f"key-{number}", f"{number}.mp4", number % 2, dataclasses.replace(clip, video=video))
        for number, video in enumerate([*videos, clip.video])
    ]
    write_set(tmp_path, samples)
    code, said = run(capsys, "check", tmp_path, "--jobs", 1, "--decode", "all", "--stall-s", 20)
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("shard-000000.tar: ")]
    named = {line.split("sample key-")[1].split(":")[0] for line in lines}
    assert all("; " in line for line in lines)
    assert len(named) > CLIPS / 2, "most of the damage is noticed"
    assert str(CLIPS) not in named, "the intact one has no fault"
    assert f"{CLIPS + 1} │ all frames decoded" in said, "every sample is reached"
