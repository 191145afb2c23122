"""Makes small real videos for tests: H.264, VP9 and others, rotated, of variable frame rate, full range or silent.

Every frame shows a moving square over a gradient that depends on the seed; the square's place tells the frame's number.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def make_video(
    path: Path,
    frames: int = 24,
    frame_rate: float = 12,
    height: int = 48,
    width: int = 64,
    seed: int = 0,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    times_s: Sequence[float] | None = None,
    rotation: int = 0,
    audio: bool = False,
    pictures: np.ndarray | None = None,
) -> Path:
    """Writes a video and returns its path; the suffix chooses the container.

    Args:
        path: The file to write; its folder is made if needed.
        frames: How many frames.
        frame_rate: Frames per second.
        height: Height in pixels.
        width: Width in pixels.
        seed: Chooses the background and the square's path.
        codec: FFmpeg's name of the encoder, such as libx264, libvpx-vp9, mpeg4 or gif.
        pixel_format: FFmpeg's name of the stored pixel format.
        options: Options of the encoder, such as {"bf": "2", "g": "250"}.
        times_s: When each frame starts, in seconds, for a variable frame rate.
        rotation: The display matrix's turn, in degrees counterclockwise.
        audio: Whether to add a second stream, silence.
        pictures: uint8 (T, H, W, 3) to encode in place of the moving square.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = moving_square(frames, height, width, seed)
    rate = Fraction(frame_rate).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        if times_s is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pixel_format)
            if times_s is None:
                frame.pts, frame.time_base = number, 1 / rate
            else:
                frame.pts, frame.time_base = round(times_s[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_silence(container, sound, seconds=len(pictures) / frame_rate)
    return path


def pack_labelled_videos(folder: Path, videos: int) -> Path:
    """Packs videos of two classes, 12 frames a second, 10 frames and more, 48 x 64; returns the shards' folder."""
    from pretrain.data.pack import PackConfig, pack

    for number in range(videos):
        name = f"{'jump' if number % 2 else 'run'}/{number}.mp4"
        make_video(folder / "videos" / name, frames=10 + 2 * number, seed=number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=4, jobs=1))
    return folder / "shards"


def moving_square(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Returns uint8 (T, H, W, 3): a bright square that moves over a gradient, both chosen by the seed."""
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows * (seed % 5 + 1), columns * (seed % 7 + 1), (rows + columns) * (seed % 3 + 1)], axis=-1) % 160
    pictures = np.repeat(base[None].astype(np.uint8), frames, axis=0)
    side = max(2, min(height, width) // 4)
    for number in range(frames):
        top = (seed * 3 + number) % max(1, height - side)
        left = (seed * 5 + 2 * number) % max(1, width - side)
        pictures[number, top : top + side, left : left + side] = 255 - 20 * (seed % 4)
    return pictures


def read_video(source: Path | str) -> np.ndarray:
    """Returns every frame of a video as uint8 (T, H, W, 3), as stored: rotation is not applied."""
    with av.open(str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def truncate(path: Path, share: float) -> Path:
    """Cuts a file to a share of its bytes, as a broken download does, and returns its path."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def corrupt(path: Path, start: float, end: float) -> Path:
    """Overwrites a stretch of a file, given as shares of its length, with zeros, and returns its path."""
    content = bytearray(path.read_bytes())
    first, last = int(len(content) * start), int(len(content) * end)
    content[first:last] = struct.pack("B", 0) * (last - first)
    path.write_bytes(content)
    return path


def _add_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    samples = 1024
    for number in range(int(seconds * 16000 / samples) + 1):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, number * samples, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
