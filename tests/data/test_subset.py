"""Parts of a shard set: read as the set is, told apart by their fingerprints, and bad lists of keys refused."""

import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.data.inspection import InspectConfig, inspect
from pretrain.data.order import Order
from pretrain.data.pack import PackConfig, pack
from pretrain.data.pack_merge import MergeConfig, merge
from pretrain.data.shards import ShardSet
from pretrain.data.subset import Subset, split_of, write_keys
from pretrain.errors import Refused
from tests.videos import make_video

SPLITS = {"train1": [0, 1, 4], "test1": [2, 3], "train2": [2, 3, 4]}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """Five videos of UCF101's form in two classes, and the lists of two splits; video 3 cannot be decoded."""
    folder = tmp_path_factory.mktemp("annotated")
    names = [f"{'AB'[number % 2]}/v_{'AB'[number % 2]}_g0{number}_c01.avi" for number in range(5)]
    for number, name in enumerate(names):
        make_video(folder / "videos" / name, frames=4, height=16, width=16, seed=number)
    (folder / "videos" / names[3]).write_bytes(b"no video")
    (folder / "lists").mkdir()
    (folder / "lists" / "classInd.txt").write_text("1 A\n2 B\n")
    for split, numbers in SPLITS.items():
        listed = "".join(f"{names[number]}\n" for number in numbers)
        (folder / "lists" / f"{split[:-1]}list0{split[-1]}.txt").write_text(listed)
    return folder


@pytest.fixture(scope="module")
def shards(annotated) -> ShardSet:
    config = {"source": str(annotated / "videos"), "annotations": str(annotated / "lists"), "split": "all"}
    pack(PackConfig(out=str(annotated / "shards"), **config, samples_per_shard=2, jobs=1))
    for part in ("0/2", "1/2"):
        pack(PackConfig(out=str(annotated / "parts"), **config, samples_per_shard=2, jobs=1, part=part))
    merge(MergeConfig(str(annotated / "parts")))
    return ShardSet.open(annotated / "shards")


def sources(shards: ShardSet) -> set[int]:
    """The numbers of the videos that a set reads."""
    return {int(shards.read(number).metadata["source"][-9:-8]) for number in range(shards.samples)}


def test_a_split_holds_the_videos_of_its_list_that_can_be_decoded(shards):
    for split, numbers in SPLITS.items():
        assert sources(split_of(shards, split)) == {number for number in numbers if number != 3}


def test_inspection_counts_the_samples_of_each_split(shards, annotated, capsys):
    inspect(InspectConfig(str(annotated / "shards")))
    assert re.search(r"splits +test1 1, train1 3, train2 2 ", capsys.readouterr().out)


def test_parts_of_a_pack_note_splits_too_and_the_json_of_a_sample_holds_them(annotated, shards):
    assert ShardSet.open(annotated / "parts").fingerprint == shards.fingerprint
    told = {}
    for path in annotated.glob("shards/*.tar"):
        with tarfile.open(path) as tar:
            contents = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
        told |= {int(content["source"][-9:-8]): content["splits"] for content in contents}
    assert told == {0: ["train1"], 1: ["train1"], 2: ["test1", "train2"], 4: ["train1", "train2"]}


def test_a_subset_is_read_by_its_own_numbers_in_the_order_of_the_set(packed_shards):
    whole = ShardSet.open(packed_shards)
    subset = pickle.loads(pickle.dumps(Subset(whole, [9, 0, 5, 4], "some")))
    assert subset.keys() == [whole.key(number) for number in (0, 4, 5, 9)]
    assert [subset.read(number).key for number in range(4)] == subset.keys()
    assert [subset.key(number) for number in range(4)] == subset.keys()
    assert subset.labels() == [whole.labels()[number] for number in (0, 4, 5, 9)]
    assert (subset.samples, len(subset), subset.samples_per_shard) == (4, 4, (1, 2, 1))
    assert [subset.locate(number)[0] for number in range(4)] == [0, 1, 1, 2]
    with pytest.raises(IndexError):
        subset.locate(4)


def test_an_order_over_a_subset_reads_each_of_its_samples_where_shards_hold_none_of_it(packed_shards):
    subset = Subset(ShardSet.open(packed_shards), [4, 5, 6], "some")
    assert subset.samples_per_shard == (0, 3, 0)
    order = Order(subset.samples_per_shard, seed=0, lanes=1, shards_per_window=2, global_batch=3)
    for epoch in range(3):
        assert sorted(order.epoch_order(epoch).tolist()) == [0, 1, 2]


def test_other_samples_are_another_fingerprint_and_the_same_ones_the_same(packed_shards):
    whole = ShardSet.open(packed_shards)
    one, other, again = Subset(whole, [1, 2], "a"), Subset(whole, [1, 3], "a"), Subset(whole, [2, 1, 1], "b")
    assert one.fingerprint == again.fingerprint
    assert len({whole.fingerprint, one.fingerprint, other.fingerprint}) == 3


def test_a_list_of_keys_that_was_written_is_read_back(packed_shards, tmp_path):
    subset = Subset(ShardSet.open(packed_shards), [3, 8], "some")
    write_keys(tmp_path / "keys.txt", subset)
    assert split_of(ShardSet.open(packed_shards), str(tmp_path / "keys.txt")).fingerprint == subset.fingerprint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda keys: "\n \n", r"keys\.txt: names no sample; write one key a line"),
        (lambda keys: f"{keys[0]}\nb\nc\n", r"keys\.txt: 2 of its 3 keys are not in .*, such as b; give a list of"),
    ],
)
def test_a_list_of_keys_that_does_not_fit_is_refused(
    packed_shards, tmp_path, content: Callable[[list[str]], str], words
):
    whole = ShardSet.open(packed_shards)
    (tmp_path / "keys.txt").write_text(content(whole.keys()))
    with pytest.raises(Refused, match=words):
        split_of(whole, str(tmp_path / "keys.txt"))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(packed_shards, shards):
    with pytest.raises(
        Refused, match=r"^train9 is no split of .* and no file; use one of test1, train1, train2, or give"
    ):
        split_of(shards, "train9")
    with pytest.raises(Refused, match=r"^train1 is no split of .*; pack with --split all, which notes the splits"):
        split_of(ShardSet.open(packed_shards), "train1")
