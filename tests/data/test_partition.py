"""Held-out samples: every class in its share, groups never parted, and all of it a pure function of keys."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.partition import groups_of, parts_of
from pretrain.errors import Refused

CLASSES = st.lists(st.integers(2, 40), min_size=1, max_size=6)


def labelled(sizes: list[int]) -> tuple[list[str], list[int]]:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return [f"key-{number}" for number in range(len(labels))], labels


@given(CLASSES, st.integers(2, 5), st.integers(0, 3))
def test_folds_share_every_class_evenly(sizes, folds, seed):
    keys, labels = labelled(sizes)
    parts = parts_of(keys, [(label,) for label in labels], [1 / folds] * folds, seed)
    for label, size in enumerate(sizes):
        counts = np.bincount(parts[np.array(labels) == label], minlength=folds)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == size


@given(CLASSES, st.floats(0.05, 0.5), st.integers(0, 3))
def test_a_share_takes_of_every_class_what_it_says_and_at_least_one(sizes, share, seed):
    keys, labels = labelled(sizes)
    held_out = parts_of(keys, [(label,) for label in labels], [1 - share, share], seed) == 1
    for label, size in enumerate(sizes):
        count = int(held_out[np.array(labels) == label].sum())
        assert 1 <= count < size
        assert count == 1 or abs(count - share * size) <= 0.5 + 1e-6


@given(st.permutations(range(20)), st.integers(0, 3))
def test_neither_the_order_of_the_shards_nor_of_their_samples_changes_who_is_held_out(order, seed):
    keys, labels = [f"{number}-{'ab'[number % 2]}" for number in range(20)], [number % 2 for number in range(20)]
    parts = parts_of(keys, [(label,) for label in labels], [0.8, 0.2], seed)
    shuffled = parts_of([keys[n] for n in order], [(labels[n],) for n in order], [0.8, 0.2], seed)
    assert shuffled.tolist() == [parts[n] for n in order]


def test_another_seed_holds_out_others():
    keys, labels = labelled([50, 50])
    one, other = (parts_of(keys, [(label,) for label in labels], [0.8, 0.2], seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_samples_of_several_classes_and_of_none_are_shared_evenly_too():
    labels = [((0, 1), (0,), (1, 2), ())[number % 4] for number in range(40)]
    parts = parts_of([f"key-{number}" for number in range(40)], labels, [0.5, 0.5], 0)
    for label in range(3):
        own = [number for number, several in enumerate(labels) if label in several]
        assert abs(int(parts[own].sum()) - len(own) / 2) <= 1
    assert int(parts[3::4].sum()) == 5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=60), st.integers(2, 4))
def test_groups_are_never_parted_whatever_their_classes(samples, folds):
    groups, labels = [str(group) for group, _ in samples], [label for _, label in samples]
    parts = parts_of(groups, [(label,) for label in labels], [1 / folds] * folds, seed=0)
    assert len(set(zip(groups, parts.tolist(), strict=True))) == len(set(groups))


def test_the_groups_of_ucf101_stay_together_in_every_class():
    keys = [f"{name}_v_{name}_g{group:02d}_c{clip:02d}-00" for name in "AB" for group in range(25) for clip in range(4)]
    labels = [0] * 100 + [1] * 100
    groups = groups_of(keys, r"(.*_g[0-9]+)_c")
    parts = parts_of(groups, [(label,) for label in labels], [0.2] * 5, seed=0)
    assert Counter(zip(labels, parts.tolist(), strict=True)) == {
        (label, fold): 20 for label in (0, 1) for fold in range(5)
    }
    assert len(set(groups)) == len(set(zip(groups, parts.tolist(), strict=True))) == 50


def test_segments_of_one_video_are_a_group_without_any_rule():
    keys = ["film-00aa-000000000-000010000", "film-00aa-000010000-000020000", "film-00bb-000000000-000010000", "x-00cc"]
    assert groups_of(keys, None) == ["film-00aa", "film-00aa", "film-00bb", "x-00cc"]


def test_a_rule_groups_by_what_its_groups_find_or_by_all_that_it_finds():
    keys = ["cam1_day2_a", "cam1_day3_a", "cam2_day2_b"]
    assert groups_of(keys, "cam[0-9]") == ["cam1", "cam1", "cam2"]
    one, other, third = groups_of(keys, "(cam[0-9])_.*_([ab])")
    assert one == other != third


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("(", r"validation\.group: '\(' is no regular expression"),
        ("_g[0-9]+_", r"validation\.group: '_g\[0-9\]\+_' finds nothing in the key b-1; give a rule for every key"),
    ],
)
def test_a_rule_that_does_not_do_is_refused(rule, words):
    with pytest.raises(Refused, match=words):
        groups_of(["a_g01_1", "b-1"], rule)
