"""Keys and draws: alike on every machine and for ever, distinct for distinct purposes, and evenly spread."""

import collections
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import randomness
from pretrain.data.randomness import key_for, permutation, raw_words, sample_key, torch_seed, uniform

KEYS = st.integers(0, 2**128 - 1)


def test_keys_and_draws_never_change_between_versions():
    key = sample_key(7, 0, 3, 12, 1, "crop")
    assert key == 305522283934602188643694734282981272084
    assert raw_words(key, 2).tolist() == [1203475456049685471, 8120682879403249866]
    assert permutation(key, 8).tolist() == [0, 2, 4, 3, 1, 6, 7, 5]
    assert uniform(key)[0] == 0.06524053519910256


def test_each_part_of_a_key_counts():
    first = (7, 0, 3, 12, 1, "crop")
    others = [(*first[:part], value, *first[part + 1 :]) for part, value in enumerate((8, 1, 4, 13, 2, "flip"))]
    assert len({sample_key(*parts) for parts in [first, *others]}) == 7


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_keys_are_alike_only_for_alike_parts(first, second):
    assert (key_for(*first) == key_for(*second)) == (first == second)


def test_the_division_into_parts_counts():
    assert key_for(1, 12) != key_for(11, 2) != key_for(112)
    assert key_for(1) != key_for("1")


def test_a_number_of_numpy_gives_the_key_of_its_value():
    assert key_for(np.int64(5), np.uint8(3), "time") == key_for(5, 3, "time")


@given(KEYS, st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_a_longer_draw_goes_on_where_a_shorter_one_ends(key, count):
    assert np.array_equal(raw_words(key, count + 5)[:count], raw_words(key, count))


@given(KEYS, st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_every_number_once(key, count):
    assert sorted(permutation(key, count).tolist()) == list(range(count))


def test_a_permutation_sorts_whole_words_the_first_of_equals_first(monkeypatch):
    """Words that are equal, or differ in their low bits alone, which random ones of a shard window hardly ever are."""
    for words in ([7, 5, 6, 4, 5, 2**40], [3, 3, 3, 3], [2**63 + 1, 2**63, 2**63 + 1], [9], []):
        drawn = np.array(words, dtype=np.uint64)
        monkeypatch.setattr(randomness, "raw_words", lambda key, count, drawn=drawn: drawn)
        assert permutation(0, len(words)).tolist() == sorted(range(len(words)), key=words.__getitem__)


@given(KEYS, st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_the_order_of_its_words(key, count):
    assert np.array_equal(permutation(key, count), np.argsort(raw_words(key, count), kind="stable"))


def test_permutations_are_equally_likely():
    counts = collections.Counter(tuple(permutation(key_for(number), 3).tolist()) for number in range(1200))
    assert len(counts) == 6
    assert all(150 < count < 250 for count in counts.values())


def test_uniform_numbers_fill_the_unit_interval_evenly():
    draws = uniform(key_for("draws"), 4000)
    assert draws.dtype == np.float64
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert np.all(np.abs(np.histogram(draws, 10, (0, 1))[0] - 400) < 80)


def test_the_largest_word_stays_below_one(monkeypatch):
    """53 of 64 bits are kept, so no word is rounded up to 1."""
    monkeypatch.setattr(randomness, "raw_words", lambda key, count: np.full(count, 2**64 - 1, np.uint64))
    assert uniform(0, 2).tolist() == [1 - 2.0**-53] * 2


def test_a_uniform_number_has_53_bits():
    draws = uniform(key_for("bits"), 100)
    assert np.array_equal(draws * 2.0**53, np.floor(draws * 2.0**53))


@given(KEYS)
@settings(max_examples=30, deadline=None)
def test_a_torch_seed_fits_torch_and_keeps_the_low_bits(key):
    assert torch.Generator().manual_seed(torch_seed(key)).initial_seed() == torch_seed(key)
    random.Random(torch_seed(key))
    assert torch_seed(key) & (2**60 - 1) == key & (2**60 - 1)
