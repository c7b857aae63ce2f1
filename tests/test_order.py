"""The order of images: every epoch has each once, and any start goes on alike."""

from hypothesis import given
from hypothesis import strategies as st

from crfnet import order
from crfnet.order import Order


@given(
    count=st.integers(1, 9),
    batch=st.integers(1, 6),
    start=st.integers(0, 7),
    more=st.integers(0, 12),
    seed=st.integers(-3, 9),
)
def test_each_epoch_has_every_image_once_and_any_start_goes_on_alike(count, batch, start, more, seed):
    all_of_them = list(Order(count, batch, seed=seed, start=0, stop=start + more))
    assert list(Order(count, batch, seed=seed, start=start, stop=start + more)) == all_of_them[start:]
    assert all(len(chosen) == batch for chosen in all_of_them)
    drawn = [pair for chosen in all_of_them for pair in chosen]
    assert [epoch for epoch, _ in drawn] == [place // count for place in range(len(drawn))]
    for epoch in range(len(drawn) // count):
        assert sorted(index for e, index in drawn if e == epoch) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    epochs = [tuple(index for _, index in chosen) for chosen in Order(20, 20, seed=0, start=0, stop=5)]
    (other,) = Order(20, 20, seed=1, start=0, stop=1)
    assert len({*epochs, tuple(index for _, index in other)}) == 6


def test_processes_share_each_batch(monkeypatch):
    whole = list(Order(7, 6, seed=2, start=3, stop=9))
    monkeypatch.setattr(order, "world_size", lambda: 3)
    shares = []
    for number in range(3):
        monkeypatch.setattr(order, "rank", lambda number=number: number)
        shares.append(list(Order(7, 6, seed=2, start=3, stop=9)))
    assert [
        [pair for trio in zip(*parts, strict=True) for pair in trio] for parts in zip(*shares, strict=True)
    ] == whole
