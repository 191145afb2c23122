"""Decoding real videos from bytes: the very frames that PyAV decodes, whichever are asked for, or a `BadSample`."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from pretrain.data.transcode import transcode
from pretrain.data.video import DecoderName, open_video
from pretrain.errors import BadSample
from tests.torchcodec_process import open_with
from tests.videos import make_video, read_video

FRAMES = 24
AS_PACKED = {"g": "8", "bf": "0"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """A video as packing writes it, large enough that its parts can be damaged one by one."""
    source = make_video(tmp_path_factory.mktemp("video") / "source.mp4", frames=48, height=96, width=128, seed=3)
    return transcode(source).video


@pytest.fixture(params=["decord", "pyav", "torchcodec"])
def decoder(request) -> DecoderName:
    return request.param


def all_frames(video: bytes, decoder: DecoderName) -> np.ndarray:
    reader = open_with(video, decoder)
    return reader.read(np.arange(len(reader)))


# decord counts the padding of rows of 24, 48 and 72 pixels as more channels.
@pytest.mark.parametrize("width", [24, 34, 40, 48, 64, 72])
@pytest.mark.parametrize("options", [AS_PACKED, {"bf": "2", "g": "12"}], ids=["as-packed", "b-frames"])
def test_chosen_frames_are_those_of_the_video(tmp_path, width, options, decoder):
    path = make_video(tmp_path / "video.mp4", frames=FRAMES, width=width, seed=3, options=options)
    expected = read_video(path)
    reader = open_with(path.read_bytes(), decoder)
    assert len(reader) == FRAMES
    for indices in ([0], [FRAMES - 1], [3, 4, 5, 6], [1, 9, 17, 23], [7, 8], [2], [5, 6, 11, 12, 22, 23]):
        frames = reader.read(np.array(indices))
        assert (frames.dtype, frames.shape) == (np.uint8, (len(indices), 48, width, 3))
        assert np.abs(frames.astype(int) - expected[indices]).max() <= 2, "backwards and forwards, across keyframes"


@pytest.mark.parametrize("width", [48, 64])
def test_a_frame_asked_for_twice_comes_twice(tmp_path, width, decoder):
    path = make_video(tmp_path / "video.mp4", frames=6, width=width, seed=1, options=AS_PACKED)
    indices = np.array([0, 0, 2, 4, 5, 5, 5])
    frames = open_with(path.read_bytes(), decoder).read(indices)
    assert np.abs(frames.astype(int) - read_video(path)[indices]).max() <= 2
    assert not np.array_equal(frames[1], frames[2])


def test_frames_are_asked_for_at_once_so_that_none_is_decoded_twice(packed, monkeypatch):
    reader = open_video(packed, "decord")
    monkeypatch.setattr("decord.VideoReader.__getitem__", None)
    assert reader.read(np.array([14, 17, 20])).shape == (3, 96, 128, 3)


def test_what_packing_writes_is_read_frame_by_frame(packed, decoder):
    with av.open(io.BytesIO(packed)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    frames = all_frames(packed, decoder)
    assert frames.shape == expected.shape == (48, 96, 128, 3)
    assert np.abs(frames.astype(int) - expected).max() <= 2


def test_torch_computes_on_the_cpu_after_decord_has_read(packed, tmp_path):
    """decord loads NVIDIA's BLAS, where installed, for the whole process; a torch that came later crashed in it."""
    video = tmp_path / "video.mp4"
    video.write_bytes(packed)
    program = (
        "import pathlib, sys; from pretrain.data.video import open_video; "
        "print(len(open_video(pathlib.Path(sys.argv[1]).read_bytes(), 'decord'))); "
        "import torch; print(torch.nn.Linear(32, 32)(torch.zeros(8, 32)).shape[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(video)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["48", "8"]), done.stderr


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_a_truncated_video_is_a_bad_sample(packed, share, decoder):
    with pytest.raises(BadSample, match=r"(decord|PyAV|torchcodec) cannot") as caught:
        all_frames(packed[: int(len(packed) * share)], decoder)
    assert "\n" not in str(caught.value)
    assert "/project/" not in str(caught.value), "lines of a decoder's source say nothing to the reader"


@pytest.mark.parametrize("damage", ["zeros in the middle", "zeros all over", "noise all over"])
def test_a_damaged_video_is_a_bad_sample(packed, damage, decoder):
    content, start = bytearray(packed), packed.find(b"mdat") + 4
    if damage == "zeros in the middle":
        content[start + 400 : start + 1500] = bytes(1100)
    elif damage == "zeros all over":
        content[start:] = bytes(len(content) - start)
    else:
        content[start:] = np.random.default_rng(0).bytes(len(content) - start)
    with pytest.raises(BadSample):
        all_frames(bytes(content), decoder)


@pytest.mark.parametrize("junk", [b"", b"no video", bytes(range(256)) * 20], ids=["empty", "text", "bytes"])
def test_junk_is_a_bad_sample(junk, decoder):
    with pytest.raises(BadSample, match=r"(decord|PyAV|torchcodec) cannot open it"):
        open_with(junk, decoder)


def test_sound_alone_is_a_bad_sample(tmp_path, decoder):
    path: Path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(BadSample, match=r"cannot find video stream|holds no video stream|best video stream is unknown"):
        open_with(path.read_bytes(), decoder)
