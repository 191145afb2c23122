"""Frame i is the i-th frame that a player shows, with every decoder that claims it: against a decode from the start."""

import gc
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from pretrain.data.pyav_reader import PyAvReader
from pretrain.data.transcode import transcode
from pretrain.data.video import DecordReader, VideoReader, open_video
from pretrain.errors import BadSample
from tests.torchcodec_process import open_with
from tests.videos import make_video

FRAMES = 48
DECODERS = ("decord", "pyav", "torchcodec")
B_FRAMES = {"bf": "2", "g": "12"}
CLOSED = B_FRAMES | {"flags": "+cgop"}
OPEN_H264 = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0:keyint=12:min-keyint=12"}
OPEN_HEVC = {"x265-params": "log-level=none:keyint=12:min-keyint=12:scenecut=0"}  # open GOP is what x265 does by itself
REFRESH = {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
UNEVEN_S = [number * 0.04 + (0.5 if number > 10 else 0) + (0.013 if number % 3 else 0) for number in range(FRAMES)]


def cut_by_edit_list(path: Path, seconds: float = 0.5) -> Path:
    """Rewrites a file as `ffmpeg -ss SECONDS -c copy` does: an edit list hides the frames up to the cut."""
    source = io.BytesIO(path.read_bytes())
    with av.open(source) as whole, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as cut:
        stream = whole.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size:
                packet.pts -= int(seconds / stream.time_base)
                packet.dts -= int(seconds / stream.time_base)
                packet.stream = copy
                cut.mux(packet)
    return path


EXACT_IN_ALL = {
    "h264": ("h264.mp4", {"options": CLOSED}),
    "h264-matroska": ("h264.mkv", {"options": CLOSED}),
    "vp9": ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "16", "auto-alt-ref": "1"}}),
    "mpeg4": ("mpeg4.mp4", {"codec": "mpeg4", "options": CLOSED | {"sc_threshold": "1000000000"}}),
    "variable-rate": ("variable.mp4", {"options": CLOSED, "times_s": UNEVEN_S}),
    "variable-rate-matroska": ("variable.mkv", {"options": CLOSED, "times_s": UNEVEN_S}),
    "late-start": ("late.mp4", {"options": CLOSED, "times_s": [3 + number / 12 for number in range(FRAMES)]}),
    "start-before-zero": ("early.mkv", {"options": CLOSED, "times_s": [number / 12 - 1 for number in range(FRAMES)]}),
    "turned-left": ("left.mp4", {"options": CLOSED, "height": 40, "rotation": 90}),
    "turned-right": ("right.mp4", {"options": CLOSED, "height": 40, "rotation": -90}),
    "upside-down": ("down.mp4", {"options": CLOSED, "height": 40, "rotation": 180}),
}
WRONG_IN_DECORD = {
    "hevc-open-gop": ("hevc.mp4", {"codec": "libx265", "options": OPEN_HEVC, "frames": 96}),
    "h264-open-gop": ("open.mp4", {"options": OPEN_H264}),
    "mpeg4-open-gop": ("open.mp4", {"codec": "mpeg4", "options": B_FRAMES}),
    "h264-gradual-refresh": ("refresh.mkv", {"options": REFRESH}),
    "mpeg4-avi": ("mpeg4.avi", {"codec": "mpeg4", "options": B_FRAMES}),
    "h264-avi": ("h264.avi", {"options": CLOSED}),
    "h264-mpeg-ts": ("h264.ts", {"options": CLOSED}),
    "h264-raw": ("raw.h264", {"options": CLOSED}),
    "cut-by-edit-list": ("cut.mp4", {"options": CLOSED}),
}
MADE = EXACT_IN_ALL | WRONG_IN_DECORD
EXACT_IN_TORCHCODEC = ("hevc-open-gop", "h264-open-gop", "mpeg4-open-gop", "cut-by-edit-list")
WRONG_IN_TORCHCODEC = ("h264-gradual-refresh", "mpeg4-avi", "h264-avi", "h264-mpeg-ts")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Callable[[str], tuple[bytes, np.ndarray]]:
    """Returns a function from a name to a video and its frames, upright, decoded with PyAV from the start."""
    made: dict[str, tuple[bytes, np.ndarray]] = {}

    def video(name: str) -> tuple[bytes, np.ndarray]:
        if name not in made:
            file, options = MADE[name]
            path = make_video(tmp_path_factory.mktemp(name) / file, **{"frames": FRAMES, "seed": 3} | options)
            if name == "cut-by-edit-list":
                cut_by_edit_list(path)
            with av.open(str(path)) as container:
                decoded = list(container.decode(video=0))
            turns = [round(frame.rotation / 90) for frame in decoded]
            pictures = [frame.to_ndarray(format="rgb24") for frame in decoded]
            upright = np.stack([np.rot90(picture, turn) for picture, turn in zip(pictures, turns, strict=True)])
            made[name] = path.read_bytes(), upright
        return made[name]

    return video


def requests(frames: int) -> list[np.ndarray]:
    """Every frame alone, in an order without order; then clips of all lengths and strides, later ones first."""
    alone = [np.array([number]) for number in np.random.default_rng(0).permutation(frames).tolist()]
    clips = [np.arange(first, frames, stride)[:16] for stride in (4, 1, 7) for first in (30, 11, 0)]
    return [*alone, *clips, np.arange(frames), np.array([0, 0, frames - 1, frames - 1])]


def wrong_reads(reader: VideoReader, expected: np.ndarray) -> int:
    """Counts the requests to which a reader does not answer with the very frames."""

    def is_wrong(indices: np.ndarray) -> bool:
        try:
            frames = reader.read(indices)
        except BadSample:
            return True
        return frames.shape != expected[indices].shape or np.abs(frames.astype(int) - expected[indices]).max() > 2

    return sum(is_wrong(indices) for indices in requests(len(expected)))


@pytest.mark.parametrize("decoder", ["decord", "pyav", "torchcodec", "auto"])
@pytest.mark.parametrize("name", EXACT_IN_ALL)
def test_every_decoder_returns_the_very_frames(videos, name, decoder):
    video, expected = videos(name)
    reader = open_with(video, decoder)
    assert len(reader) == len(expected) == FRAMES
    assert wrong_reads(reader, expected) == 0


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize("name", WRONG_IN_DECORD)
def test_files_that_decord_reads_wrongly_are_read_exactly(videos, name, decoder):
    video, expected = videos(name)
    reader = open_video(video, decoder)
    assert len(reader) == len(expected) > 0
    assert wrong_reads(reader, expected) == 0


@pytest.mark.parametrize("name", [name for name in WRONG_IN_DECORD if name != "h264-raw"])
def test_decord_returns_wrong_frames_which_is_why_auto_avoids_it(videos, name):
    """Where this fails decord has been mended, and the table of decoders may say so."""
    video, expected = videos(name)
    assert wrong_reads(DecordReader(video), expected) > 0


@pytest.mark.parametrize("name", EXACT_IN_TORCHCODEC)
def test_torchcodec_reads_open_groups_of_pictures_and_edit_lists_exactly(videos, name):
    video, expected = videos(name)
    reader = open_with(video, "torchcodec")
    assert len(reader) == len(expected)
    assert wrong_reads(reader, expected) == 0


@pytest.mark.parametrize("name", WRONG_IN_TORCHCODEC)
def test_torchcodec_returns_wrong_frames_of_other_files_that_decord_misreads(videos, name):
    """Where this fails torchcodec has been mended, and the table of decoders may say so."""
    video, expected = videos(name)
    assert wrong_reads(open_with(video, "torchcodec"), expected) > 0


def test_decord_shifts_frames_of_hevc_with_open_groups_of_pictures(videos):
    video, expected = videos("hevc-open-gop")
    reader = DecordReader(video)
    read = np.concatenate([reader.read(np.array([number])) for number in reversed(range(len(expected)))])[::-1]
    nearest = [int(np.abs(expected - frame.astype(int)).sum((1, 2, 3)).argmin()) for frame in read]
    shifts = [shown - asked for asked, shown in enumerate(nearest)]
    assert set(shifts) == {0, 1}, "the next frame comes in place of some, and no error"
    assert 4 <= sum(shifts) < len(expected) / 2


def test_frames_with_colours_of_high_definition_are_alike_in_all_decoders(tmp_path):
    options = {"g": "8", "bf": "0", "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709"}
    video = make_video(tmp_path / "video.mp4", frames=4, seed=5, options=options).read_bytes()
    decord, *others = (open_with(video, decoder).read(np.arange(4)).astype(int) for decoder in DECODERS)
    assert all(np.abs(decord - other).max() <= 2 for other in others)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    source = make_video(tmp_path_factory.mktemp("packed") / "source.mp4", frames=FRAMES, height=96, width=128, seed=3)
    return transcode(source, gop=16).video


def test_all_decoders_give_the_same_bits_for_what_packing_writes(packed):
    decord, *others = (open_with(packed, decoder).read(np.arange(FRAMES)) for decoder in DECODERS)
    for other in others:
        np.testing.assert_array_equal(decord, other)


def test_frames_are_decoded_from_the_keyframe_before_them_on(packed):
    with av.open(io.BytesIO(packed)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    damaged = bytearray(packed)
    for position, size in packets[8:16]:
        damaged[position : position + size] = bytes(size)
    whole, reader = open_video(packed, "pyav"), open_video(bytes(damaged), "pyav")
    for indices in (np.arange(16, 32), np.array([3, 17, 40])):
        np.testing.assert_array_equal(reader.read(indices), whole.read(indices))
    with pytest.raises(BadSample, match="cannot decode frames 12 to 20"):
        reader.read(np.array([12, 20]))


def test_a_frame_past_the_last_is_refused(packed, videos):
    for video, decoder in ((packed, "pyav"), (packed, "torchcodec"), (videos("mpeg4-avi")[0], "pyav")):
        reader = open_with(video, decoder)
        with pytest.raises(BadSample, match=f"cannot decode frames {FRAMES - 1} to {FRAMES}"):
            reader.read(np.array([FRAMES - 1, FRAMES]))


def test_a_flipped_bit_is_noticed_by_pyav(packed):
    """decord returns what the codec makes up in place of the damaged picture."""
    noticed = 0
    for seed in range(12):
        damaged = bytearray(packed)
        damaged[int(np.random.default_rng(seed).integers(packed.find(b"mdat") + 4, len(packed)))] ^= 16
        try:
            open_video(bytes(damaged), "pyav").read(np.arange(FRAMES))
        except BadSample:
            noticed += 1
    assert noticed >= 6


def test_a_reader_leaves_nothing_for_the_garbage_collector(packed):
    """A cycle would keep each video in memory until the collector comes, hundreds of samples later."""
    open_video(packed, "pyav").read(np.arange(2))
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        open_video(packed, "pyav").read(np.arange(20))
        gc.collect()
        kept = {type(one).__module__.split(".")[0] for one in gc.garbage}
        assert not kept & {"av", "pretrain"}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("name", [*EXACT_IN_ALL, *WRONG_IN_DECORD])
def test_auto_never_takes_decord(videos, name):
    assert isinstance(open_video(videos(name)[0]), PyAvReader)
