import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from crfnet.ops import reference
from crfnet.ops.exact import ExactEngine, split_into_tiles


def draw(P: int, D: int, C: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features, values, grad = (torch.randn(P, k, generator=generator, dtype=torch.float64) for k in (D, C, C))
    return [scale * features, values, grad]


def exact(features: Tensor, values: Tensor) -> Tensor:
    return reference.gaussian_filter(features[None].double(), values[None].double())[0]


def cloud(kind: str, P: int, D: int, scale: float, seed: int) -> Tensor:  # (P, D) float64
    """Feature clouds that are hard on boxes, on the cut or on the rounding."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(P, D, generator=generator, dtype=torch.float64)
    if kind == "line":  # boxes of a diagonal line are mostly empty
        points = points[:, :1].expand(P, D).contiguous()
    elif kind == "duplicates":
        points = points[torch.randint(max(1, P // 10), (P,), generator=generator)]
    elif kind == "shell":  # one point amid a crowd just about where pairs begin to be skipped
        points = 4 / scale * points / points.norm(dim=1, keepdim=True).clamp(min=1e-9)
        points[0] = 0
    elif kind == "outliers":
        points[:: max(2, P // 5)] *= 1e3
    elif kind == "grid":  # ties in every sort
        points = points.round()
    elif kind == "clusters":
        points = 0.1 * points + 5 * torch.randint(-1, 2, (P, D), generator=generator)
    elif kind == "piles":  # boxes without extent: here the bound is tight
        points = torch.zeros_like(points)
        points[:, 0] = 4 / scale * torch.randint(0, 4, (P,), generator=generator)
    return scale * points


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["normal", "line", "duplicates", "shell", "outliers", "grid", "clusters", "piles"]),
    P=st.integers(1, 200) | st.sampled_from([63, 64, 65, 128, 129, 192, 193]),
    D=st.integers(1, 16),
    C=st.integers(1, 40),
    scale=st.floats(0.01, 100),
    offset=st.sampled_from([0.0, 1e4]),
    tolerance=st.sampled_from([0.0, 1e-6, 1e-3, 0.03, 0.5]),
    tile=st.sampled_from([8, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
@example("piles", 192, 2, 1, 1.0, 0.0, 1e-3, 8, torch.float64, 0)
@example("shell", 300, 2, 1, 1.0, 0.0, 0.5, 4, torch.float64, 0)
@example("outliers", 193, 5, 3, 30.0, 1e4, 1e-3, 64, torch.float32, 0)
def test_the_bound_holds(kind, P, D, C, scale, offset, tolerance, tile, dtype, seed):
    features = (cloud(kind, P, D, scale, seed) + offset).to(dtype)  # what float32 makes of them is the input
    _, values, _ = draw(P, D, C, seed=seed)
    values[:, 0] = 1  # the worst case: all skipped messages add up
    values[P // 2] *= 1e3  # or come from one point, far from most
    values = values.to(dtype)
    engine = ExactEngine(features, [P], tolerance, tile)
    assert 0 <= engine.error_bound <= tolerance and 0 < engine.kept_fraction <= 1
    bound = engine.error_bound + engine.rounding_bound
    mass = exact(features, torch.ones(P, 1))  # (P, 1), K 1
    error = (engine.apply(values) - exact(features, values)).abs()
    assert (error <= bound * mass * values.abs().amax(0)).all()
    # with values 1 the largest value is 1, which the giant above would hide
    error = (engine.apply(torch.ones(P, 1, dtype=dtype)) - mass).abs()
    assert (error <= bound * mass).all()


def test_pairs_are_skipped_and_the_bound_is_used():
    """Otherwise the property above would hold for an engine that skips nothing."""
    features, _, _ = draw(1500, 3, 1, scale=6)
    engines = [ExactEngine(features, [1500], tolerance, tile=8) for tolerance in (0.0, 1e-6, 1e-3, 0.1)]
    fractions = [engine.kept_fraction for engine in engines]
    assert fractions == sorted(fractions, reverse=True) and fractions[-1] < 0.4 < fractions[0]
    ones = torch.ones(1500, 1, dtype=torch.float64)
    mass = reference.gaussian_filter_chunked(features, ones)
    errors = [float(((engine.apply(ones) - mass).abs() / mass).max()) for engine in engines]
    assert errors[0] <= 1e-13 and errors[3] > 1e-5
    for engine, error in zip(engines, errors, strict=True):
        assert error <= engine.error_bound + engine.rounding_bound


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    D=st.integers(1, 16),
    tile=st.sampled_from([1, 7, 16]),
    seed=st.integers(0, 2**31),
)
def test_tiles_are_a_permutation_of_each_item(counts, D, tile, seed):
    features, _, _ = draw(sum(counts), D, 1, seed=seed)
    order, sizes, item = split_into_tiles(features.round(), counts, tile)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    item_of_point = torch.repeat_interleave(torch.tensor(counts))
    assert torch.equal(item_of_point[order], torch.repeat_interleave(item, sizes))
    for i, count in enumerate(counts):
        assert sizes[item == i].tolist() == [tile] * (count // tile) + [count % tile] * (count % tile > 0)


def test_tiles_are_compact():
    features = torch.rand(4096, 2, generator=torch.Generator().manual_seed(0))
    order, sizes, _ = split_into_tiles(features, [4096], 64)
    points = features[order].view(64, 64, 2)
    width = points.amax(1) - points.amin(1)
    assert width.prod(1).mean() <= 1.1 / 64  # 64 tiles share a unit square


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize(("P", "D", "C"), [(1, 1, 1), (7, 1, 300), (130, 5, 21), (65, 16, 2), (256, 2, 40)])
def test_values_and_gradients_are_the_definitions(P, D, C, tile):
    features, values, grad = draw(P, D, C)
    engine = ExactEngine(features, [P], tolerance=0.0, tile=tile)
    torch.testing.assert_close(engine.apply(values), exact(features, values), rtol=1e-11, atol=1e-11)
    wanted = reference.feature_gradient(features[None], values[None], grad[None])[0]
    torch.testing.assert_close(engine.feature_gradient(values, grad), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(engine.diagonal(), torch.ones(P, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.3, 3.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_as_precise_as_differences_allow(scale, offset):
    """Wide tiles and tiles far from the origin: expanding |a - b|² about the origin is off by 1 in the exponent."""
    features, values, grad = draw(400, 5, 21, scale)
    features, values, grad = (features + offset).float(), values.float(), grad.float()
    engine = ExactEngine(features, [400], tolerance=0.0)
    truth = exact(features, values)
    assert (engine.apply(values) - truth).norm() <= 2e-6 * truth.norm()
    wanted = reference.feature_gradient(features[None].double(), values[None].double(), grad[None].double())[0]
    assert (engine.feature_gradient(values, grad) - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12


@settings(max_examples=25)
@given(P=st.integers(1, 200), D=st.integers(1, 8), scale=st.floats(0.1, 20), seed=st.integers(0, 2**31))
def test_is_its_own_adjoint_with_pairs_skipped(P, D, scale, seed):
    features, x, y = draw(P, D, 3, scale, seed)
    engine = ExactEngine(features, [P], tolerance=0.5, tile=8)  # a bound loose enough that symmetry is not for free
    gap = (engine.apply(x) * y).sum() - (x * engine.apply(y, transpose=True)).sum()
    assert gap.abs() <= 1e-12 * (engine.apply(x.abs()) * y.abs()).sum()


def test_permuting_the_points_permutes_the_output():
    features, values, grad = draw(333, 4, 5, scale=2)
    shuffle = torch.randperm(333, generator=torch.Generator().manual_seed(1))
    engine = ExactEngine(features, [333], tolerance=0.0, tile=16)
    shuffled = ExactEngine(features[shuffle], [333], tolerance=0.0, tile=16)
    torch.testing.assert_close(shuffled.apply(values[shuffle]), engine.apply(values)[shuffle], rtol=1e-12, atol=1e-12)
    gradient = engine.feature_gradient(values, grad)[shuffle]
    torch.testing.assert_close(
        shuffled.feature_gradient(values[shuffle], grad[shuffle]), gradient, rtol=1e-11, atol=1e-11
    )


def test_items_do_not_interact_and_may_be_empty():
    counts = [100, 0, 1, 77, 0]
    features, values, grad = draw(sum(counts), 3, 4)
    engine = ExactEngine(features, counts, tolerance=0.0, tile=16)
    outputs = zip(engine.apply(values).split(counts), engine.feature_gradient(values, grad).split(counts), strict=True)
    items = zip(features.split(counts), values.split(counts), grad.split(counts), strict=True)
    for (out, gradient), (f, v, g) in zip(outputs, items, strict=True):
        torch.testing.assert_close(out, exact(f, v), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, reference.feature_gradient(f[None], v[None], g[None])[0])
    assert engine.kept_fraction == 1


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_points_at_all(counts):
    engine = ExactEngine(torch.zeros(0, 3), counts)
    assert engine.apply(torch.zeros(0, 2)).shape == (0, 2)
    assert engine.feature_gradient(torch.zeros(0, 2), torch.zeros(0, 2)).shape == (0, 3)
    assert engine.diagonal().shape == (0,) and engine.error_bound == 0


def test_one_point_seen_many_times():
    engine = ExactEngine(torch.full((500, 3), 7.7), [500])
    out = engine.apply(torch.ones(500, 2))
    torch.testing.assert_close(out, torch.full((500, 2), 500.0))
    assert not engine.feature_gradient(torch.ones(500, 2), torch.ones(500, 2)).abs().max() > 1e-3


def test_points_infinitely_far_apart_hear_only_themselves():
    features = torch.tensor([[0.0], [1e15], [-1e15], [1e30]]).expand(4, 3).contiguous()
    values = torch.arange(8.0).view(4, 2)
    torch.testing.assert_close(ExactEngine(features, [4]).apply(values), values, rtol=0, atol=0)


@pytest.mark.parametrize(("theta_alpha", "theta_beta"), [(160.0, 3.0), (67.0, 3.0), (80.0, 13.0)])
def test_real_photograph(data_root, theta_alpha, theta_beta):
    image = np.asarray(Image.open(data_root / "refine" / "voc_2007_000332.png").convert("RGB"))[100:160, 100:200]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    features = np.concatenate([np.stack([y, x], -1) / theta_alpha, image / theta_beta], -1).reshape(-1, 5)
    features = torch.tensor(features, dtype=torch.float32)
    values = torch.randn(len(features), 21, generator=torch.Generator().manual_seed(0)).softmax(1)
    rows = torch.arange(0, len(features), 97)
    truth = reference.gaussian_filter_chunked(features.double(), values.double(), rows)
    engine = ExactEngine(features, [len(features)])
    assert (engine.apply(values)[rows] - truth).norm() <= 1e-5 * truth.norm()
    assert engine.kept_fraction < 0.8
