"""What an mp4 file's index says, against the files that were made; damaged files give no answer and no error."""

import av
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.mp4 import Mp4Video, read_mp4_video
from pretrain.data.transcode import transcode
from tests.videos import make_video


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    return transcode(make_video(tmp_path_factory.mktemp("mp4") / "source.mp4", frames=4, width=40)).video


def test_a_packed_video_is_h264_in_order_without_edits(packed):
    assert read_mp4_video(packed) == Mp4Video("avc1", width=40, in_order=True, edited=False)


@pytest.mark.parametrize(
    ("options", "codec", "expected"),
    [
        ({"bf": "2", "g": "12"}, "libx264", Mp4Video("avc1", 64, in_order=False, edited=True)),
        ({"bf": "0"}, "mpeg4", Mp4Video("mp4v", 64, in_order=True, edited=True)),
        ({"x265-params": "log-level=none"}, "libx265", Mp4Video("hev1", 64, in_order=False, edited=True)),
    ],
)
def test_codec_order_and_edits_are_told(tmp_path, options, codec, expected):
    path = make_video(tmp_path / "video.mp4", codec=codec, options=options)
    assert read_mp4_video(path.read_bytes()) == expected


def test_several_tracks_fragments_and_other_containers_are_not_told(tmp_path):
    assert read_mp4_video(make_video(tmp_path / "sound.mp4", frames=4, audio=True).read_bytes()) is None
    assert read_mp4_video(make_video(tmp_path / "video.mkv", frames=4).read_bytes()) is None
    path = tmp_path / "fragmented.mp4"
    with (
        av.open(str(make_video(tmp_path / "video.mp4"))) as source,
        av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as fragmented,
    ):
        copy = fragmented.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                fragmented.mux(packet)
    assert read_mp4_video(path.read_bytes()) is None


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_raises_an_error(packed, data):
    end = data.draw(st.integers(0, len(packed)), label="end")
    damaged = bytearray(packed[:end])
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8)):
        if position < end:
            damaged[position] = value
    found = read_mp4_video(bytes(damaged))
    assert found is None or isinstance(found, Mp4Video)
