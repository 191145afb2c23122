"""Segments: what is cut out of a video is what was on screen then, and long videos become consecutive samples."""

import dataclasses
import io
import itertools
import json
import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.pack import PackConfig, pack
from pretrain.data.segments import Segment, consecutive_segments
from pretrain.data.shards import ShardSet
from pretrain.data.transcode import duration_of, transcode
from pretrain.errors import BadSample, Refused
from tests.data.test_pack import content, stop_before_the_end
from tests.videos import make_video, moving_square, truncate


def decoded(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def numbers_of(frames: np.ndarray, pictures: np.ndarray) -> list[int]:
    """Which of the pictures each frame shows."""
    return [int(np.argmin([np.abs(frame.astype(int) - picture).mean() for picture in pictures])) for frame in frames]


@pytest.mark.parametrize(
    ("name", "making"),
    [
        ("b_frames.mp4", {"options": {"bf": "3", "g": "20", "x264-params": "open-gop=1:scenecut=0"}}),
        ("one_keyframe.mp4", {"options": {"g": "250"}}),
        ("b_frames.mkv", {"options": {"bf": "2", "g": "12"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "15", "cpu-used": "8", "deadline": "realtime"}}),
        ("mpeg4.avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "12"}}),
        ("transport.ts", {"options": {"bf": "2", "g": "12"}}),
    ],
)
def test_a_segment_holds_the_frames_that_were_on_screen_then(tmp_path, name, making):
    source = make_video(tmp_path / name, frames=72, **making)
    result = transcode(source, segment=Segment(4000, 5500))
    assert (result.frames, result.frame_rate) == (18, 12)
    assert numbers_of(decoded(result.video), moving_square(72, 48, 64)) == list(range(48, 66))


def test_a_segment_starts_with_the_frame_that_is_on_screen_at_its_start(tmp_path):
    source = make_video(tmp_path / "a.mkv", frames=4, frame_rate=10, times_s=[0, 1, 3.05, 4], options={"bf": "0"})
    frames = decoded(transcode(source, frame_rate=2, segment=Segment(2000, 4000)).video)
    assert numbers_of(frames, moving_square(4, 48, 64)) == [1, 1, 1, 2]


def test_only_the_packets_around_a_segment_are_read(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=240, options={"g": "12"})
    read = []
    transcode(source, segment=Segment(10_000, 11_000), on_progress=lambda: read.append(1))
    assert len(read) < 100


def test_a_segment_past_the_end_of_its_video_is_refused(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=60)
    for segment in (Segment(59_000, 69_000), Segment(4000, 9000)):
        with pytest.raises(BadSample, match=r"ends after 5\.0 s, with less than half of the segment"):
            transcode(source, segment=segment)
    assert transcode(source, segment=Segment(4000, 5900)).frames == 12, "what there is, if it is more than half"


@given(st.integers(0, 9999), st.integers(1, 100_000), st.integers(100, 9999))
def test_consecutive_segments_leave_out_less_than_a_quarter_of_one(start_ms, length_ms, longest_ms):
    whole = Segment(start_ms, start_ms + length_ms)
    segments = consecutive_segments(whole, longest_ms)
    lengths_ms = [segment.end_ms - segment.start_ms for segment in segments]
    assert all(one.end_ms == other.start_ms for one, other in itertools.pairwise(segments))
    assert segments[0].start_ms == start_ms
    assert set(lengths_ms[:-1]) <= {longest_ms}
    assert len(segments) == 1 or longest_ms / 4 <= lengths_ms[-1] <= longest_ms
    assert 0 <= whole.end_ms - segments[-1].end_ms < longest_ms / 4


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm"])
def test_the_length_of_a_video_is_read_without_decoding_it(tmp_path, name):
    codec = {"avi": "mpeg4", "webm": "libvpx-vp9"}.get(name[2:], "libx264")
    assert float(duration_of(make_video(tmp_path / name, frames=30, codec=codec))) == pytest.approx(2.5, abs=0.1)


def test_the_length_of_a_file_that_states_none_is_that_of_its_packets(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=30, codec="mpeg4")
    with av.open(str(source)) as given, av.open(str(tmp_path / "live.mkv"), "w", options={"live": "1"}) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                made.mux(packet)
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert not container.duration
    assert float(duration_of(tmp_path / "live.mkv")) == pytest.approx(2.5, abs=0.1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Videos of 5, 2.2 and 1 s in two classes, and a broken one."""
    folder = tmp_path_factory.mktemp("long")
    for name, frames in (("jump/long.mp4", 60), ("run/medium.mkv", 26), ("run/short.mp4", 12)):
        make_video(folder / name, frames=frames, options={"g": "12"})
    truncate(make_video(folder / "run/broken.mp4"), 0.5)
    return folder


def config(videos: Path, out: Path, jobs: int = 1) -> PackConfig:
    return PackConfig(source=str(videos), out=str(out), segment_s=2, samples_per_shard=2, jobs=jobs)


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(config(videos, out))
    return out


def test_long_videos_become_samples_that_tell_their_segment(packed):
    shards = ShardSet.open(packed)
    samples = [shards.read(number) for number in range(shards.samples)]
    rows = sorted(
        (sample.metadata["source"], sample.metadata.get("start"), sample.metadata.get("end"), sample.frames)
        for sample in samples
    )
    assert rows == [
        ("jump/long.mp4", 0, 2, 24),
        ("jump/long.mp4", 2, 4, 24),
        ("jump/long.mp4", 4, 5, 12),
        ("run/medium.mkv", 0, 2, 24),
        ("run/short.mp4", None, None, 12),
    ]
    assert {sample.metadata["source"]: sample.label for sample in samples} == {
        "jump/long.mp4": 0,
        "run/medium.mkv": 1,
        "run/short.mp4": 1,
    }
    keys = {sample.metadata.get("start"): sample.key for sample in samples if "long" in sample.metadata["source"]}
    assert keys[2].endswith("-000002000-000004000")
    assert len({key.rsplit("-", 2)[0] for key in keys.values()}) == 1
    (rejected,) = (packed / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["source"] == "run/broken.mp4"


def test_a_second_run_and_an_interrupted_one_give_the_same_bytes(videos, packed, tmp_path, monkeypatch):
    pack(config(videos, tmp_path / "again", jobs=2))
    assert content(tmp_path / "again") == content(packed)
    out = tmp_path / "interrupted"
    stop_before_the_end(monkeypatch, config(videos, out), OSError(5, "words"))
    pack(config(videos, out))
    assert content(out) == content(packed)


def test_other_segments_are_another_pack(videos, packed):
    with pytest.raises(Refused, match=r"packed with segment_s 2, now None"):
        pack(PackConfig(source=str(videos), out=str(packed), samples_per_shard=2))


@pytest.mark.parametrize("annotated", [False, True])
def test_a_video_that_hangs_costs_itself_alone_also_with_segments(tmp_path, annotated):
    """Reading a pipe that nobody writes to never returns; its length is asked for before, unless annotated."""
    make_video(tmp_path / "videos/0abcdefghij.mp4", frames=48, options={"g": "12"})
    pipe = tmp_path / "videos/_dbcJuKJQNs.mp4"
    os.mkfifo(pipe)
    end = threading.Timer(60, lambda: os.close(os.open(pipe, os.O_RDWR)))  # lets this test fail instead of hanging
    end.start()
    lines = ("label,youtube_id,time_start,time_end,split,is_cc", "a,0abcdefghij,0,4,val,0", "b,_dbcJuKJQNs,4,6,val,0")
    (tmp_path / "val.csv").write_text("\n".join(lines))
    given = {"annotations": str(tmp_path / "val.csv")} if annotated else {}
    pack_config = config(tmp_path / "videos", tmp_path / "out")
    summary = pack(dataclasses.replace(pack_config, stall_s=0.5, **given))
    end.cancel()
    died = "crashes its decoder, or makes no progress for 0.5 s"
    reason = f"{died} (segment 4 to 6 s)" if annotated else died
    assert [(rejection.source, rejection.reason) for rejection in summary.rejected] == [(pipe.name, reason)]
    assert summary.accepted == 2, "the segments of the other"
