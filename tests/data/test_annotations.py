"""Official annotation files: the right videos with the right labels, one class order for all splits, and bad input."""

import json
from pathlib import Path

import pytest

from pretrain.data.pack import PackConfig, pack
from pretrain.data.segments import Segment
from pretrain.data.shards import ShardSet
from pretrain.data.sources import Sources, find_sources
from pretrain.errors import Refused
from tests.videos import make_video

KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
abseiling,-3B32lodo2M,59,69,val,0
"air drumming",_dbcJuKJQNs,4,6,val,0
"petting animal (not cat)",0abcdefghij,0,10,val,1
"""
SSV2_LABELS = {"Holding something next to something": "1", "Holding something": "0", "Tearing something": "2"}
SSV2 = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "tearing paper", "template": "Tearing [something]", "placeholders": ["paper"]},
]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def labels(sources: Sources) -> dict[str, str]:
    return {video.path: sources.classes[video.label] for video in sources.videos}


@pytest.fixture
def kinetics(tmp_path) -> Path:
    write(tmp_path, {"val.csv": KINETICS})
    return write(tmp_path / "videos", {"-3B32lodo2M_000059_000069.mp4": "", "notes.txt": ""})


@pytest.fixture
def ssv2(tmp_path) -> Path:
    write(tmp_path, {"val.json": json.dumps(SSV2), "something-something-v2-labels.json": json.dumps(SSV2_LABELS)})
    return write(tmp_path / "videos", {"78687.webm": "", "42326.mp4": "", "1.webm": ""})


@pytest.fixture
def ucf101(tmp_path) -> Path:
    lists = {
        "classInd.txt": "1 Archery\r\n2 Biking\r\n3 YoYo\r\n",
        "trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 3\nArchery/v_Archery_g08_c01.avi 1\n",
        "testlist01.txt": "Biking/v_Biking_g01_c01.avi\r\n",
    }
    write(tmp_path / "lists", lists)
    videos = ("YoYo/v_YoYo_g08_c01.avi", "Archery/v_Archery_g08_c01.avi", "Biking/v_Biking_g01_c01.avi")
    return write(tmp_path / "UCF-101", dict.fromkeys(videos, ""))


@pytest.fixture
def hmdb51(tmp_path) -> Path:
    splits = {
        "brush_hair_test_split1.txt": "a (1).avi 1 \nb.avi 2 \nc.avi 0 \n",
        "brush_hair_test_split2.txt": "a (1).avi 2 \nb.avi 1 \nc.avi 0 \n",
        "wave_test_split1.txt": "a.avi 2 \nb.avi 1 \n",
        "wave_test_split2.txt": "a.avi 0 \nb.avi 0 \n",
    }
    write(tmp_path / "splits", splits)
    names = ("brush_hair/a (1).avi", "brush_hair/b.avi", "brush_hair/c.avi", "wave/a.avi", "wave/b.avi")
    return write(tmp_path / "hmdb51", dict.fromkeys(names, ""))


def test_kinetics_takes_cut_videos_whole_and_cuts_the_segment_out_of_others(kinetics, tmp_path):
    write(kinetics, {"_dbcJuKJQNs.mkv": ""})
    sources = find_sources(kinetics, annotations=tmp_path / "val.csv")
    assert labels(sources) == {
        "-3B32lodo2M_000059_000069.mp4": "abseiling",
        "0abcdefghij_000000_000010.mp4": "petting animal (not cat)",
        "_dbcJuKJQNs.mkv": "air drumming",
    }
    assert {video.path: video.segment for video in sources.videos if video.segment} == {
        "_dbcJuKJQNs.mkv": Segment(4000, 6000)
    }
    assert sources.classes == ("abseiling", "air drumming", "petting animal (not cat)")


def test_several_segments_of_one_video_are_samples_of_their_own(tmp_path):
    write(tmp_path, {"a.csv": KINETICS + "abseiling,0abcdefghij,20,30,train,1\n" * 2})
    sources = find_sources(write(tmp_path / "v", {"0abcdefghij.mp4": ""}), annotations=tmp_path / "a.csv")
    parts = [video for video in sources.videos if video.segment]
    assert [(sources.classes[video.label], video.segment.start_ms) for video in parts] == [
        ("petting animal (not cat)", 0),
        ("abseiling", 20_000),
    ]
    assert len({video.key for video in parts}) == 2


def test_of_several_files_the_one_in_the_folder_of_the_class_is_taken(tmp_path):
    write(tmp_path, {"val.csv": KINETICS})
    names = ("a/0abcdefghij_000000_000010.mp4", "petting_animal_not_cat/0abcdefghij_000000_000010.mp4")
    sources = find_sources(write(tmp_path / "v", dict.fromkeys(names, "")), annotations=tmp_path / "val.csv")
    assert names[1] in labels(sources)


def test_a_split_of_kinetics_keeps_the_classes_of_the_whole_file(kinetics, tmp_path):
    write(tmp_path, {"all.csv": KINETICS + "zumba,abcdefghijk,0,10,train,0\n"})
    sources = find_sources(kinetics, annotations=tmp_path / "all.csv", split="val")
    assert len(sources.videos) == 3
    assert sources.classes[-1] == "zumba"


def test_something_something_takes_names_from_templates_and_numbers_from_the_labels_file(ssv2, tmp_path):
    sources = find_sources(ssv2, annotations=tmp_path / "val.json")
    assert sources.classes == ("Holding something", "Holding something next to something", "Tearing something")
    assert labels(sources) == {"42326.mp4": "Tearing something", "78687.webm": "Holding something next to something"}
    (tmp_path / "something-something-v2-labels.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(Refused, match=r"labels\.json: is missing, and it holds the order of the classes"):
        find_sources(ssv2, annotations=tmp_path / "val.json")
    given = find_sources(ssv2, annotations=tmp_path / "val.json", classes=str(tmp_path / "elsewhere.json"))
    assert given == sources


def test_annotations_without_labels_are_packed_unlabelled_only(ssv2, tmp_path):
    write(tmp_path, {"test.json": '[{"id": "1"}]', "test.csv": "youtube_id,time_start,time_end,split\n1,0,1,test\n"})
    for name in ("test.json", "test.csv"):
        with pytest.raises(Refused, match="has no label; name a file that gives labels, or pack with --unlabelled"):
            find_sources(ssv2, annotations=tmp_path / name)
        assert find_sources(ssv2, annotations=tmp_path / name, unlabelled=True).classes == ()


def test_ucf101_numbers_classes_by_its_own_file_in_every_split(ucf101, tmp_path):
    lists = tmp_path / "lists"
    train = find_sources(ucf101, annotations=lists / "trainlist01.txt")
    assert labels(train) == {"Archery/v_Archery_g08_c01.avi": "Archery", "YoYo/v_YoYo_g08_c01.avi": "YoYo"}
    test = find_sources(ucf101, annotations=lists, split="test1")
    assert labels(test) == {"Biking/v_Biking_g01_c01.avi": "Biking"}
    assert train.classes == test.classes == ("Archery", "Biking", "YoYo")
    assert find_sources(ucf101.parent, annotations=lists, split="train1").videos[0].path.startswith("UCF-101/Archery/")


def test_handstand_pushups_are_one_class_though_ucf101_spells_its_videos_otherwise(tmp_path):
    lists = {
        "classInd.txt": "1 HandstandPushups\r\n2 HandstandWalking\r\n",
        "trainlist01.txt": "HandstandPushups/v_HandStandPushups_g08_c01.avi 1\r\n",
    }
    write(tmp_path / "lists", lists)
    for folder in ("HandstandPushups", "HandStandPushups"):
        video = f"{folder}/v_HandStandPushups_g08_c01.avi"
        sources = find_sources(write(tmp_path / folder, {video: ""}), annotations=tmp_path / "lists/trainlist01.txt")
        assert labels(sources) == {video: "HandstandPushups"}
        assert sources.classes == ("HandstandPushups", "HandstandWalking")


def test_hmdb51_takes_the_split_that_is_asked_for(hmdb51, tmp_path):
    splits = tmp_path / "splits"
    train = find_sources(hmdb51, annotations=splits, split="train1")
    assert labels(train) == {"brush_hair/a (1).avi": "brush_hair", "wave/b.avi": "wave"}
    assert labels(find_sources(hmdb51, annotations=splits, split="test1")) == {
        "brush_hair/b.avi": "brush_hair",
        "wave/a.avi": "wave",
    }
    second = find_sources(hmdb51, annotations=splits, split="test2")
    assert labels(second) == {"brush_hair/a (1).avi": "brush_hair"}
    assert second.classes == train.classes


def test_all_splits_of_a_folder_are_noted_and_no_video_is_taken_twice(ucf101, hmdb51, tmp_path):
    write(tmp_path / "lists", {"trainlist02.txt": "Biking/v_Biking_g01_c01.avi 2\n", "testlist02.txt": ""})
    sources = find_sources(ucf101, annotations=tmp_path / "lists", split="all")
    assert {video.path.split("/")[0]: video.splits for video in sources.videos} == {
        "Archery": ("train1",),
        "Biking": ("test1", "train2"),
        "YoYo": ("train1",),
    }
    assert sources.classes == ("Archery", "Biking", "YoYo")
    sources = find_sources(hmdb51, annotations=tmp_path / "splits", split="all")
    assert {video.path: video.splits for video in sources.videos} == {
        "brush_hair/a (1).avi": ("train1", "test2"),
        "brush_hair/b.avi": ("test1", "train2"),
        "wave/a.avi": ("test1",),
        "wave/b.avi": ("train1",),
    }


def test_all_splits_of_kinetics_are_those_of_its_column(kinetics, tmp_path):
    write(tmp_path, {"all.csv": KINETICS + "zumba,abcdefghijk,0,10,train,0\n"})
    sources = find_sources(kinetics, annotations=tmp_path / "all.csv", split="all")
    assert sorted(video.splits for video in sources.videos) == [("train",), ("val",), ("val",), ("val",)]


@pytest.mark.parametrize(
    ("name", "text", "split", "words"),
    [
        ("gone.csv", None, None, r"gone\.csv: no such file; name the annotation file"),
        ("list.txt", "a.mp4 0\n", None, r"list\.txt: not an annotation file that is known here .* with --list"),
        ("a.csv", "video,label\n", None, r"a\.csv: has no column youtube_id"),
        ("a.csv", "youtube_id,time_start,time_end\n", None, r"a\.csv: lists no video"),
        ("a.csv", KINETICS + "x,y,9,5,val,0\n", None, r"a\.csv:5: gives no segment of a video \(youtube_id 'y'"),
        ("a.csv", KINETICS + "x,y,one,5,val,0\n", None, r"a\.csv:5: gives no segment"),
        ("a.csv", KINETICS, "train", r"split: .*a\.csv has no 'train'; use one of val"),
        ("a.csv", KINETICS + "zumba,-3B32lodo2M,59,69,val,0\n", None, r"a\.csv:5: .* has another label at .*a\.csv:2"),
        ("a.json", "{}", None, r"a\.json: not a list of videos"),
        ("a.json", "[", None, r"a\.json: not a JSON file"),
        ("a.json", '[{"template": "x"}]', None, r"a\.json: entry 1 has no id"),
        ("a.json", '[{"id": "1"}]', "train1", r"split: .*a\.json is one split already; drop --split"),
        ("trainlist01.txt", "v_YoYo_g08_c01.avi 3\n", None, r"trainlist01\.txt:1: .* is not `CLASS/VIDEO"),
        ("x_test_split1.txt", "a.avi 1\n", None, r"x_test_split1\.txt: is for one class; name its folder"),
        ("splits/x_test_split1.txt", "a.avi 7\n", "train1", r"x_test_split1\.txt:1: .* is not `VIDEO\.avi TAG`"),
        ("splits/x_test_split1.txt", "a.avi 1\n", None, r"split: is missing of those .* use one of train1, test1"),
        ("splits/x_test_split1.txt", "a.avi 1\n", "val", r"split: 'val' is none of those"),
        ("splits/notes.txt", "", None, r"splits: holds neither CLASS_test_split1\.txt \(HMDB51\) nor trainlist01"),
    ],
)
def test_bad_annotations_are_refused_by_name(kinetics, tmp_path, name, text, split, words):
    if text is not None:
        write(tmp_path, {name: text})
    path = tmp_path / name
    with pytest.raises(Refused, match=words):
        find_sources(kinetics, annotations=path.parent if path.parent != tmp_path else path, split=split)


def test_a_number_that_contradicts_the_class_file_is_refused(ucf101, tmp_path):
    write(tmp_path / "lists", {"trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 1\n"})
    with pytest.raises(Refused, match=r"trainlist01\.txt:1: .* with the number that classInd\.txt gives"):
        find_sources(ucf101, annotations=tmp_path / "lists/trainlist01.txt")
    write(tmp_path / "lists", {"classInd.txt": "1 Archery\n3 YoYo\n"})
    with pytest.raises(Refused, match=r"classInd\.txt does not number its classes from 1 without gaps \(see 'YoYo'\)"):
        find_sources(ucf101, annotations=tmp_path / "lists/testlist01.txt")


def test_a_folder_with_none_of_the_videos_is_refused_at_once(ssv2, kinetics, tmp_path):
    (kinetics / "-3B32lodo2M_000059_000069.mp4").unlink()
    with pytest.raises(Refused, match=r"holds none of the 3 videos that .*val\.csv lists, such as -3B32lodo2M_000059"):
        find_sources(kinetics, annotations=tmp_path / "val.csv")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"annotations": "a.csv", "list": "a.txt", "source": "."}, "list, annotations: "),
        ({"annotations": "a.csv"}, "source: is missing; name the folder of the videos"),
        ({"split": "train1", "source": "."}, "split: belongs to --annotations"),
        ({"segment_s": 0.01, "source": "."}, "segment_s: 0.01 does not do"),
        ({"segment_s": float("nan"), "source": "."}, "segment_s: nan does not do"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, fields, words):
    with pytest.raises(Refused, match=words):
        pack(PackConfig(out=str(tmp_path / "out"), **fields))
    assert not (tmp_path / "out").exists()


def test_packing_kinetics_cuts_labels_and_lists_what_is_missing(tmp_path):
    write(tmp_path, {"val.csv": KINETICS})
    make_video(tmp_path / "v/-3B32lodo2M_000059_000069.mp4", frames=12)
    make_video(tmp_path / "v/_dbcJuKJQNs.mp4", frames=84)
    config = PackConfig(source=str(tmp_path / "v"), out=str(tmp_path / "out"), annotations=str(tmp_path / "val.csv"))
    assert pack(config).accepted == 2
    shards = ShardSet.open(tmp_path / "out")
    samples = sorted((shards.read(number) for number in range(2)), key=lambda sample: sample.frames)
    assert [(sample.frames, shards.classes[sample.label], sample.metadata.get("start")) for sample in samples] == [
        (12, "abseiling", None),
        (24, "air drumming", 4),
    ]
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line) == {"source": "0abcdefghij_000000_000010.mp4", "reason": "No such file or directory"}
    write(tmp_path, {"one.csv": "".join(KINETICS.splitlines(keepends=True)[:2])})
    train = find_sources(tmp_path / "v", annotations=tmp_path / "one.csv", classes=str(tmp_path / "out"))
    assert train.classes == shards.classes, "a subset can take the classes of shards that are packed"


def test_hmdb51_packs_videos_whose_names_hold_what_shells_and_players_take_for_more(tmp_path, monkeypatch):
    names = ("#1_%03d_(a)_ride_f.avi", "a;b&c_[x]_ride_f.avi", "http:a_ride_f.avi")
    for number, name in enumerate(names):
        make_video(tmp_path / "ride_bike" / name, frames=6, codec="mpeg4", seed=number)
    write(tmp_path / "splits", {"ride_bike_test_split1.txt": "".join(f"{name} 1 \n" for name in names)})
    monkeypatch.chdir(tmp_path / "ride_bike")
    assert pack(PackConfig(source=".", out="../out", annotations="../splits", split="train1", jobs=1)).accepted == 3
    shards = ShardSet.open(tmp_path / "out")
    assert {shards.read(number).metadata["source"] for number in range(3)} == set(names)
    assert shards.classes == ("ride_bike",)
