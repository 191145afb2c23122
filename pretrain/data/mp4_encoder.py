"""Encodes frames into the mp4 that shards store: H.264, closed GOPs, no B-frames, quick to decode.

The output is 8-bit yuv420p with limited range, BT.601 matrix and square pixels, upright, without sound or edit list,
with the moov atom first. The same frames, options and FFmpeg give the same bytes on every machine: one encoder thread,
bit-exact scaling and muxing.
"""

import dataclasses
import os
from fractions import Fraction

import av
from av.video.frame import PictureType, VideoFrame

PRESET = "faster"
"""libx264 preset: at equal size "fast" is 0.3 dB better and 18 % slower, "veryfast" 0.8 dB worse and 23 % faster."""
CRF = 20
"""libx264 quality: visually close to the source; 23 is libx264's default, lower is better and larger."""

BT601 = 6  # AVCOL_SPC_SMPTE170M
LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
TRANSPOSE = {90: "cclock", -90: "clock"}


@dataclasses.dataclass(frozen=True)
class Transcoded:
    """A transcoded video: mp4 bytes, how many frames, frames per second, and its size in pixels."""

    video: bytes
    frames: int
    frame_rate: float
    height: int
    width: int


class Mp4Encoder:
    """Scales, turns and encodes frames, one per tick, into an mp4 file in memory."""

    def __init__(self, size: tuple[int, int], rate: Fraction, gop: int) -> None:
        """Takes upright (width, height) in pixels, frames per second, and frames from keyframe to keyframe."""
        self.width, self.height = size
        self.rate, self.frames = rate, 0
        # A file without a disk: the muxer opens its output a second time to put the index in front of the frames.
        self.memory = os.memfd_create("tubelet")
        self.path = f"/proc/self/fd/{self.memory}"
        self.graphs: dict[tuple, av.filter.Graph] = {}
        muxing = {"movflags": "+faststart", "fflags": "+bitexact", "use_editlist": "0"}
        self.container = av.open(self.path, "w", format="mp4", options=muxing)
        encoding = {"preset": PRESET, "tune": "fastdecode", "crf": str(CRF), "bf": "0", "sc_threshold": "0"}
        stream = self.container.add_stream("libx264", rate=rate, options={**encoding, "flags": "+cgop+bitexact"})
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.gop_size, context.thread_count, context.time_base = gop, 1, 1 / rate
        context.colorspace, context.color_range = BT601, LIMITED_RANGE
        self.stream = stream

    def __del__(self) -> None:
        os.close(self.memory)

    def write(self, frame: VideoFrame) -> None:
        """Encodes a frame as the next tick."""
        picture = self._normalised(frame)
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        picture.pict_type = PictureType.NONE
        self.frames += 1
        self.container.mux(self.stream.encode(picture))

    def finish(self) -> Transcoded:
        """Returns the finished video."""
        self.container.mux(self.stream.encode(None))
        self.container.close()
        size_bytes = os.stat(self.memory).st_size
        with open(self.path, "rb") as file:
            video = file.read(size_bytes)
        return Transcoded(video, self.frames, float(self.rate), self.height, self.width)

    def _normalised(self, frame: VideoFrame) -> VideoFrame:
        rotation = quarter_turn(frame)
        look = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, rotation)
        if look not in self.graphs:
            self.graphs[look] = self._graph(frame, rotation)
        graph = self.graphs[look]
        graph.vpush(frame)
        return graph.vpull()

    def _graph(self, frame: VideoFrame, rotation: int) -> av.filter.Graph:
        turned = rotation in TRANSPOSE
        width, height = (self.height, self.width) if turned else (self.width, self.height)
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1"
        source += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        scale = f"w={width}:h={height}:flags={SCALE_FLAGS}:out_color_matrix=bt601:out_range=limited"
        filters = [("buffer", source), ("scale", scale), ("format", "yuv420p")]
        if turned:
            filters.append(("transpose", TRANSPOSE[rotation]))
        elif rotation:
            filters += [("hflip", ""), ("vflip", "")]
        filters += [("setsar", "1"), ("buffersink", "")]
        graph = av.filter.Graph()
        nodes = [graph.add(name, arguments) if arguments else graph.add(name) for name, arguments in filters]
        graph.link_nodes(*nodes).configure()
        return graph


def quarter_turn(frame: VideoFrame) -> int:
    """Returns the rotation that the file asks for, counterclockwise: the nearest of 0, 90, -90 and 180 degrees."""
    turns = round(frame.rotation / 90) % 4
    return (0, 90, 180, -90)[turns]
