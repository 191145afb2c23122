"""Finding the videos to pack: labels from folders and lists, keys, and each way in which the input can be bad."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.sources import find_sources, key_of, parse_list, read_classes
from pretrain.errors import Refused


def touch(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def listing(folder, text, name="list.txt"):
    (folder / name).write_text(text)
    return folder / name


def labels(sources):
    return {video.path: video.label for video in sources.videos}


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path):
    sources = find_sources(touch(tmp_path, "run/b.mp4", "jump/deep/a.MKV", "jump/c.webm", "run/notes.txt"))
    assert sources.classes == ("jump", "run")
    assert labels(sources) == {"jump/c.webm": 0, "jump/deep/a.MKV": 0, "run/b.mp4": 1}
    assert sources.ignored == 1


def test_a_folder_with_videos_beside_folders_is_unlabelled(tmp_path):
    sources = find_sources(touch(tmp_path, "a.mp4", "jump/b.mp4"))
    assert (sources.classes, labels(sources)) == ((), {"a.mp4": None, "jump/b.mp4": None})


def test_the_video_that_leaves_class_folders_without_labels_is_named(tmp_path):
    touch(tmp_path, "jump/b.mp4")
    assert find_sources(tmp_path).outside is None
    assert find_sources(touch(tmp_path, "a.mp4")).outside == "a.mp4"
    assert find_sources(tmp_path, unlabelled=True).outside is None
    (tmp_path / "jump/b.mp4").unlink()
    assert find_sources(tmp_path).outside is None


def test_more_class_names_than_a_path_has_letters_are_class_names():
    names = tuple(f"class {number}" for number in range(700))
    assert read_classes(",".join(names)) == names
    with pytest.raises(Refused, match="is no file"):
        read_classes("x" * 5000)
    with pytest.raises(Refused, match="'a' stands twice") as caught:
        read_classes("a," * 5000)
    assert len(str(caught.value)) < 400
    with pytest.raises(Refused, match="no such folder"):
        find_sources("x" * 5000)


def test_labels_can_be_left_out(tmp_path):
    sources = find_sources(touch(tmp_path, "run/b.mp4", "jump/a.mp4"), unlabelled=True)
    assert (sources.classes, labels(sources)) == ((), {"jump/a.mp4": None, "run/b.mp4": None})


def test_classes_given_decide_the_numbers(tmp_path):
    folder = touch(tmp_path / "videos", "run/b.mp4", "jump/a.mp4")
    names = listing(tmp_path, "walk\nrun\njump\n", "classes.txt")
    assert labels(find_sources(folder, classes=str(names))) == {"jump/a.mp4": 2, "run/b.mp4": 1}
    assert labels(find_sources(folder, classes="run, jump")) == {"jump/a.mp4": 1, "run/b.mp4": 0}
    with pytest.raises(Refused, match="'jump'"):
        find_sources(folder, classes="run,walk")


def test_hidden_files_are_no_videos(tmp_path):
    sources = find_sources(touch(tmp_path, "a.mp4", "._a.mp4", ".trash/b.mp4"))
    assert labels(sources) == {"a.mp4": None}


def test_a_link_that_leads_back_is_entered_once(tmp_path):
    touch(tmp_path, "jump/a.mp4")
    (tmp_path / "jump" / "loop").symlink_to(tmp_path)
    assert len(find_sources(tmp_path).videos) == 1


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("a.mp4 0\nb c.mp4 2\n", ("0", "1", "2"), {"a.mp4": 0, "b c.mp4": 2}),
        ("a.mp4 run\r\n\nb.mp4\tjump\r\n", ("jump", "run"), {"a.mp4": 1, "b.mp4": 0}),
        ("\ufeffa.mp4 0", ("0",), {"a.mp4": 0}),
    ],
)
def test_a_list_gives_paths_and_labels(tmp_path, text, classes, expected):
    sources = find_sources(None, listing(tmp_path, text))
    assert (sources.root, sources.classes, labels(sources)) == (tmp_path, classes, expected)


def test_paths_below_the_root_are_stored_relative_to_it(tmp_path):
    sources = find_sources(tmp_path, listing(tmp_path, f"{tmp_path}/x/a.mp4 0\n./x/b.mp4 0\n"))
    assert labels(sources) == {"x/a.mp4": 0, "x/b.mp4": 0}


def test_an_unlabelled_list_may_hold_labels_or_not(tmp_path):
    touch(tmp_path, "a b.mp4", "c.mp4")
    sources = find_sources(tmp_path, listing(tmp_path, "a b.mp4\nc.mp4 1\n"), unlabelled=True)
    assert labels(sources) == {"a b.mp4": None, "c.mp4": None}


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("a.mp4 0\nb.mp4\n", None, r"list\.txt:2: no label"),
        ("a.mp4 0\nmy b.mp4\n", None, r"list\.txt:2: no label"),
        ("a.mp4 -1\n", None, r"list\.txt:1: label -1"),
        ("a.mp4 999999999999\n", None, r"list\.txt:1: label 999999999999"),
        ("a.mp4 0\n\nb.mp4 2\n", "x,y", r"list\.txt:3: label '2' is none of the 2 classes"),
        ("a.mp4 0\nb.mp4 1\n./a.mp4 1\n", None, r"list\.txt:3: a\.mp4 stands on line 1 already"),
        ("\n\n", None, r"list\.txt: empty"),
    ],
)
def test_a_bad_list_is_refused_by_file_and_line(tmp_path, text, classes, words):
    with pytest.raises(Refused, match=words):
        find_sources(tmp_path, listing(tmp_path, text), classes=classes)


def test_bad_folders_and_files_are_refused_by_name(tmp_path):
    with pytest.raises(Refused, match="nowhere: no such folder"):
        find_sources(tmp_path / "nowhere")
    with pytest.raises(Refused, match=r"gone\.txt: cannot be read"):
        find_sources(tmp_path, tmp_path / "gone.txt")
    with pytest.raises(Refused, match="holds no video"):
        find_sources(touch(tmp_path, "notes.txt"))
    with pytest.raises(Refused, match="nothing to pack"):
        find_sources(None)


@pytest.mark.parametrize("classes", ["nowhere.txt", "a,b,a", ","])
def test_bad_classes_are_refused(classes):
    with pytest.raises(Refused, match="classes: "):
        read_classes(classes)


@given(st.lists(st.text(), min_size=2, max_size=20, unique=True))
def test_keys_are_unique_and_safe_whatever_the_names(paths):
    keys = [key_of(path.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")) for path in paths]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.lists(WORD, min_size=1, max_size=3).map(" ".join), WORD), max_size=10))
def test_a_list_reads_back_as_it_was_written(entries):
    entries = [(f"{path}.mp4", label) for path, label in entries if not label.lower().endswith((".ts", ".gif"))]
    lines = [f"{path} {label}" for path, label in entries]
    assert parse_list(lines, "list") == [(number, *entry) for number, entry in enumerate(entries, 1)]


def test_a_folder_of_images_alone_is_a_set_and_images_beside_videos_are_not(tmp_path):
    sources = find_sources(touch(tmp_path, "cat/a.jpg", "cat/b.PNG", "dog/c.webp", "dog/d.jpeg", "dog/notes.txt"))
    assert labels(sources) == {"cat/a.jpg": 0, "cat/b.PNG": 0, "dog/c.webp": 1, "dog/d.jpeg": 1}
    assert sources.ignored == 1
    sources = find_sources(touch(tmp_path, "dog/e.mp4"))
    assert (labels(sources), sources.ignored) == ({"dog/e.mp4": 0}, 5)


def test_a_list_may_name_images_beside_videos(tmp_path):
    assert labels(find_sources(tmp_path, listing(tmp_path, "a.mp4 x\nb.jpg y\n"))) == {"a.mp4": 0, "b.jpg": 1}
    with pytest.raises(Refused, match="no label"):
        find_sources(tmp_path, listing(tmp_path, "a.mp4 x\nmy b.jpg\n"))


def test_classes_come_from_labels_files_and_shard_sets(tmp_path):
    numbered = listing(tmp_path, '{"b": "0", "a": 1}', "labels.json")
    assert read_classes(str(numbered)) == ("b", "a")
    (tmp_path / "shards").mkdir()
    with pytest.raises(Refused, match=r"holds no index\.json"):
        read_classes(str(tmp_path / "shards"))
    listing(tmp_path / "shards", '{"classes": ["b", "a"]}', "index.json")
    assert read_classes(str(tmp_path / "shards")) == ("b", "a")
    for text in ('{"classes": []}', "[]", "{"):
        listing(tmp_path / "shards", text, "index.json")
        with pytest.raises(Refused, match="classes: "):
            read_classes(str(tmp_path / "shards"))
    with pytest.raises(Refused, match=r"does not number its classes from 0 without gaps \(see 'a'\)"):
        read_classes(str(listing(tmp_path, '{"b": "0", "a": "2"}', "labels.json")))
