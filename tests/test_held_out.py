"""Files held out of a training set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crfnet.data import hold_out


@given(total=st.integers(1, 40), share=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_every_file_is_on_one_side_and_the_seed_decides_which(total, share, seed):
    files, count = [f"{index}.png" for index in range(total)], int(share * total)
    held_out, rest = hold_out(files, count, seed=seed)
    assert len(held_out) == count and sorted(held_out + rest) == sorted(files)
    assert hold_out(files, count, seed=seed) == (held_out, rest)
    more, _ = hold_out(files, min(count + 1, total - 1), seed=seed)
    assert more[:count] == held_out


def test_the_draw_is_the_same_for_ever():
    assert hold_out(range(12), 4, seed=10)[0] == [1, 3, 11, 9]  # or DeepLab's recipes would hold out other images


def test_seeds_draw_differently():
    assert len({tuple(hold_out(range(30), 10, seed=seed)[0]) for seed in range(5)}) == 5


@pytest.mark.parametrize(("count", "least"), [(5, 0), (-1, 0), (0, 1)])
def test_something_must_be_left_to_train_on(count, least):
    with pytest.raises(ValueError, match=rf"count must be {least}\.\.4 of 5 files, got {count}"):
        hold_out(range(5), count, seed=0, least=least)
