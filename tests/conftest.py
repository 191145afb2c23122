"""What every test shares: one thread for each process, and a small shard set of real videos."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: tests run beside each other on few cores

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.videos import make_video, pack_labelled_videos

PACKED_VIDEOS = 11


def pytest_collection_finish() -> None:
    """Takes what was imported out of the collections that the end of each run starts."""
    gc.freeze()


@pytest.fixture
def compiling() -> Iterator[None]:
    """Lets a test compile models as the first that does."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def packed_shards(tmp_path_factory) -> Path:
    """A folder of three shards: 11 labelled videos of two classes, 12 frames a second, 10 to 30 frames, 48 x 64."""
    return pack_labelled_videos(tmp_path_factory.mktemp("packed-shards"), PACKED_VIDEOS)


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory) -> Path:
    """A folder of two shards: 5 unlabelled videos of 15 frames, for mixtures."""
    from pretrain.data.pack import PackConfig, pack

    folder = tmp_path_factory.mktemp("other-shards")
    for number in range(5):
        make_video(folder / "videos" / f"other-{number}.mp4", frames=15, seed=50 + number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=3, jobs=1))
    return folder / "shards"


@pytest.fixture(scope="session")
def sized_shards(tmp_path_factory) -> Path:
    """A folder of three shards: 12 labelled videos of two classes, of nine sizes and 1 to 24 frames."""
    from pretrain.data.pack import PackConfig, pack

    folder = tmp_path_factory.mktemp("sized-shards")
    sizes = [(48, 64), (64, 48), (32, 32), (40, 96), (24, 24), (48, 48), (64, 64), (20, 60), (56, 40)]
    lengths = [1, 3, 5, 9, 16, 24]
    for number in range(12):
        height, width = sizes[number % len(sizes)]
        path = folder / "videos" / f"{'jump' if number % 2 else 'run'}/{number}.mp4"
        make_video(path, frames=lengths[number % len(lengths)], height=height, width=width, seed=number)
    pack(PackConfig(source=str(folder / "videos"), out=str(folder / "shards"), samples_per_shard=4, jobs=1))
    return folder / "shards"
