"""Transcoding turns any small real video into H.264 at a constant rate, upright, the same each time."""

import io
import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pretrain.data.transcode import Transcoded, at_constant_rate, fitted_size, rounded_rate, transcode
from pretrain.errors import BadSample
from tests.videos import corrupt, make_video, moving_square, truncate


def decoded(result: Transcoded) -> np.ndarray:
    with av.open(io.BytesIO(result.video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize(
    ("name", "making"),
    [
        ("h264.mp4", {}),
        ("b_frames.mp4", {"options": {"bf": "3", "g": "250", "x264-params": "open-gop=1"}}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("mpeg4.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("animation.gif", {"codec": "gif", "pixel_format": "rgb8", "frame_rate": 10}),
        ("with_sound.mp4", {"audio": True}),
        ("full_range.mp4", {"pixel_format": "yuvj420p"}),
        ("ten_bits.mp4", {"pixel_format": "yuv420p10le"}),
        ("full_chroma.mov", {"pixel_format": "yuv444p"}),
    ],
)
def test_any_codec_becomes_the_same_pictures_in_h264(tmp_path, name, making):
    source = make_video(tmp_path / name, seed=3, **making)
    result = transcode(source)
    frames = decoded(result)
    assert (result.frames, result.height, result.width) == frames.shape[:3] == (24, 48, 64)
    assert result.frame_rate == making.get("frame_rate", 12)
    tolerance = 20 if name.endswith("gif") else 6  # 256 colours
    assert distance(frames, moving_square(24, 48, 64, seed=3)) < tolerance


def test_the_stored_form_is_what_every_decoder_agrees_on(tmp_path):
    result = transcode(make_video(tmp_path / "a.mp4", frames=40, audio=True, pixel_format="yuvj420p"), gop=8)
    with av.open(io.BytesIO(result.video)) as container:
        (stream,) = container.streams
        packets = [packet for packet in container.demux(stream) if packet.size]
        frames = [frame for packet in packets for frame in packet.decode()] + stream.codec_context.decode(None)
    assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 12, 40)
    assert [number for number, packet in enumerate(packets) if packet.is_keyframe] == [0, 8, 16, 24, 32]
    assert [packet.pts for packet in packets] == [packet.dts for packet in packets], "no B-frames"
    assert {(frame.format.name, frame.color_range, frame.colorspace) for frame in frames} == {("yuv420p", 1, 6)}
    assert result.video.find(b"moov") < result.video.find(b"mdat"), "the index comes first"
    assert b"elst" not in result.video, "no edit list"


def test_the_same_file_gives_the_same_bytes_whatever_the_threads(tmp_path):
    source = make_video(tmp_path / "a.mp4", height=90, width=120)
    assert transcode(source, short_side=32) == transcode(source, short_side=32, decoder_threads=4)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_is_applied(tmp_path, rotation):
    source = make_video(tmp_path / "a.mp4", rotation=rotation, seed=2)
    expected = np.rot90(moving_square(24, 48, 64, seed=2), rotation // 90, axes=(1, 2))
    frames = decoded(transcode(source))
    assert frames.shape == expected.shape
    assert distance(frames, expected) < 6
    with av.open(io.BytesIO(transcode(source).video)) as container:
        assert next(container.decode(video=0)).rotation == 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate_becomes_constant_with_each_frame_at_its_time(tmp_path, suffix):
    times_s = [0, 0.1, 0.2, 0.5, 1.0, 1.1]
    source = make_video(tmp_path / f"a.{suffix}", frames=6, frame_rate=10, times_s=times_s, options={"bf": "0"})
    frames = decoded(transcode(source, frame_rate=10))
    pictures = moving_square(6, 48, 64)
    shown = [int(np.argmin([distance(frame, picture) for picture in pictures])) for frame in frames]
    assert shown == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 5]


def test_a_lower_frame_rate_takes_every_nth_frame(tmp_path):
    source = make_video(tmp_path / "a.mp4", frames=30, frame_rate=30)
    frames = decoded(transcode(source, frame_rate=7.5))
    assert distance(frames, moving_square(30, 48, 64)[::4]) < 6
    assert len(frames) == 8


@pytest.mark.parametrize(("height", "width", "stored"), [(300, 400, (64, 84)), (51, 41, (50, 40)), (2, 2, (2, 2))])
def test_the_short_side_comes_down_but_never_up(tmp_path, height, width, stored):
    source = make_video(tmp_path / "a.mp4", frames=2, height=height, width=width, pixel_format="yuv444p")
    result = transcode(source, short_side=64)
    assert (result.height, result.width) == stored


def test_a_single_frame_is_a_video(tmp_path):
    assert transcode(make_video(tmp_path / "a.mp4", frames=1)).frames == 1


@pytest.mark.parametrize("frame_rate", [None, 60, 7.5])
@pytest.mark.parametrize(
    ("name", "mode", "saving"),
    [
        ("a.jpg", "RGB", {"quality": 95}),
        ("100%d [a]*?.jpeg", "RGB", {"quality": 95, "progressive": True}),
        ("grey.jpg", "L", {}),
        ("print.jpg", "CMYK", {"quality": 95}),
        ("a.png", "RGB", {}),
        ("palette.PNG", "P", {}),
        ("transparent.png", "RGBA", {}),
        ("wrongly_named.jpg", "RGB", {"format": "PNG"}),
        ("a.webp", "RGB", {"lossless": True}),
    ],
)
def test_an_image_is_a_video_of_one_frame(tmp_path, name, mode, saving, frame_rate):
    (picture,) = moving_square(1, 50, 70, seed=2)
    Image.fromarray(picture).convert(mode).save(tmp_path / name, **saving)
    result = transcode(tmp_path / name, frame_rate=frame_rate)
    (frame,) = decoded(result)
    assert (result.frames, result.frame_rate, result.height, result.width) == (1, frame_rate or 25, 50, 70)
    expected = np.asarray(Image.fromarray(picture).convert(mode).convert("RGB"))
    assert distance(frame, expected) < {"CMYK": 12, "P": 20}.get(mode, 8)


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    (picture,) = moving_square(1, 48, 64, seed=2)
    turned = Image.Exif()
    turned[0x0112] = 6  # the top of the picture is on the right
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95, exif=turned)
    (frame,) = decoded(transcode(tmp_path / "a.jpg"))
    assert distance(frame, np.rot90(picture, -1)) < 6


def test_a_file_that_lost_little_of_its_end_is_kept(tmp_path):
    source = truncate(make_video(tmp_path / "a.mkv", frames=100, options={"g": "10"}), 0.92)
    assert 90 <= transcode(source).frames < 100


def broken_files(folder):
    good = make_video(folder / "good.mkv", frames=100, options={"g": "10"})
    yield truncate(good, 0.5), "truncated"
    yield truncate(make_video(folder / "no_index.mp4"), 0.5), "Invalid data"
    yield corrupt(make_video(folder / "zeros.mp4", frames=100, codec="mpeg4"), 0.1, 0.6), "damaged"
    (folder / "empty.mp4").touch()
    yield folder / "empty.mp4", "Invalid data"
    (folder / "text.mp4").write_text("no video " * 1000)
    yield folder / "text.mp4", "Invalid data"
    yield folder / "missing.mp4", "No such file"
    Image.new("RGB", (64, 48)).save(folder / "image.png")
    yield truncate(folder / "image.png", 0.5), "Invalid data|none of its"
    (folder / "a_folder.mp4").mkdir()
    yield folder / "a_folder.mp4", "directory"
    yield make_video(folder / "jump.mkv", frames=3, times_s=[0, 0.1, 1000]), "jump by 1000 s"
    yield make_audio(folder / "sound.mp4"), "no video stream"


def make_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def test_what_cannot_be_decoded_is_refused_in_one_line(tmp_path):
    for path, words in broken_files(tmp_path):
        with pytest.raises(BadSample, match=words) as caught:
            transcode(path)
        assert "\n" not in str(caught.value)


@given(st.integers(1, 60), st.integers(1, 200), st.sampled_from([Fraction(30), Fraction(30000, 1001), Fraction(25, 2)]))
def test_a_constant_rate_passes_unchanged_in_spite_of_rounded_times(frames, tick_ms, rate):
    times = [(Fraction(round(number / rate * 1000), 1000), 1 / rate, number) for number in range(frames)]
    assert list(at_constant_rate(times, rate, 1 / rate / 2)) == list(range(frames))


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 60))
def test_the_output_lasts_as_long_as_the_input_and_never_goes_back(gaps_ms, rate):
    starts = [Fraction(start, 1000) for start in itertools.accumulate(gaps_ms)]
    starts = [start - starts[0] for start in starts]
    frames = [(start, Fraction(1, 50), number) for number, start in enumerate(starts)]
    shown = list(at_constant_rate(frames, Fraction(rate), Fraction(1, 100)))
    assert shown == sorted(shown)
    assert abs(Fraction(len(shown), rate) - (starts[-1] + Fraction(1, 50))) <= max(Fraction(1, rate), Fraction(1, 50))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 256).map(lambda half: 2 * half))
def test_fitted_sizes_are_even_and_no_larger_than_asked(width, height, short_side):
    fitted = fitted_size(width, height, short_side)
    assert all(side >= 2 and side % 2 == 0 for side in fitted)
    assert min(fitted) <= short_side
    assert fitted[0] <= max(2, width)
    assert fitted[1] <= max(2, height)


@pytest.mark.parametrize(("measured", "rate"), [("29.97", (30000, 1001)), ("30.001", (30, 1)), ("12.5", (25, 2))])
def test_frame_rates_are_rounded_to_those_that_people_mean(measured, rate):
    assert rounded_rate(Fraction(measured)) == Fraction(*rate)
