"""The exact engine's kernels in Triton's interpreter, which multiplies in float32 whatever precision it is told."""

import math

import pytest
import torch
from torch import Tensor

from crfnet.ops import reference
from crfnet.ops.gpu.target import TARGETS

pytest.importorskip("triton")
from crfnet.ops.gpu import exact, exact_pairs, exact_split  # noqa: E402
from crfnet.ops.gpu.exact import TritonExactEngine  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("float32", "tf32", "fp16")


def draw(P: int, D: int, C: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features, values, grad = (torch.randn(P, k, generator=generator) for k in (D, C, C))
    return [(scale * features).to(device), values.to(device), grad.to(device)]


def cloud(kind: str, P: int, D: int) -> Tensor:
    """Features that are hard on boxes, on cuts or on rounding."""
    features = draw(P, D, 1)[0]
    if kind == "clusters":
        features = 0.1 * features + 4 * torch.arange(P, device=device)[:, None].remainder(5)
    elif kind == "outliers":
        features[:: max(2, P // 5)] *= 1e5  # tiles as wide as float32 cares about, next to narrow ones
    elif kind == "far":
        features = 3 * features + 1e6  # where neighbours in float32 are 1/16 of a bandwidth apart
    elif kind == "piles":  # boxes without extent, at the distances where pairs begin to be left out
        features = torch.zeros_like(features)
        features[:, 0] = 4.0 * torch.arange(P, device=device).remainder(4)
    return features


def per_item(function, counts: list[int], *tensors: Tensor) -> Tensor:
    """A definition applied to each item in float64, the items one after the other."""
    parts = zip(*(tensor.double().split(counts) for tensor in tensors), strict=True)
    return torch.cat([function(*(part[None] for part in item))[0] for item in parts if len(item[0])])


def filtered(features: Tensor, values: Tensor, counts: list[int]) -> Tensor:
    return per_item(reference.gaussian_filter, counts, features, values)


def rounded(x: Tensor, bits: int = 10) -> Tensor:
    """To the nearest of so many bits after the point."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


@pytest.mark.parametrize(
    ("counts", "D", "C", "scale"),
    [
        ([1], 1, 1, 1.0),
        ([63, 65], 2, 3, 1.0),
        ([64], 3, 21, 3.0),
        ([130, 0, 1, 64, 66], 5, 40, 1.0),
        ([70], 16, 21, 0.3),
        ([65], 4, 300, 1.0),
    ],
)
def test_values_and_gradients_are_the_definitions(counts, D, C, scale):
    features, values, grad = draw(sum(counts), D, C, scale)
    engine = TritonExactEngine(features, counts, 1e-9, "float32")
    truth = filtered(features, values, counts)
    items = zip(features.split(counts), values.split(counts), strict=True)
    plain = torch.cat([reference.gaussian_filter(f[None], v[None])[0] for f, v in items])  # what float32 itself costs
    allowed = 2 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (engine.apply(values) - truth).abs().max() <= allowed
    wanted = per_item(reference.feature_gradient, counts, features, values, grad)
    plain = torch.cat(
        [
            reference.feature_gradient(f[None], v[None], g[None])[0]
            for f, v, g in zip(*(tensor.split(counts) for tensor in (features, values, grad)), strict=True)
        ]
    )
    allowed = 2 * (plain - wanted).abs().max() + 1e-6 * wanted.abs().max()
    assert (engine.feature_gradient(values, grad) - wanted).abs().max() <= allowed
    assert torch.equal(engine.diagonal(), torch.ones(sum(counts), device=device))


@pytest.mark.parametrize("kind", ["clusters", "outliers", "far", "piles"])
@pytest.mark.parametrize(("tolerance", "precision"), [(1e-6, "float32"), (3e-4, "tf32"), (0.3, "fp16")])
def test_the_bound_holds(kind, tolerance, precision):
    counts = [200, 130] if kind in ("clusters", "piles") else [130, 65]  # of the others every pair is kept anyway
    features = torch.cat([cloud(kind, n, 3) for n in counts])
    values = draw(sum(counts), 1, 3)[1]
    values[:, 0] = 1  # the worst case: all that is left out adds up
    values[77] *= 1e3
    engine = TritonExactEngine(features, counts, tolerance, precision)
    assert 0 <= engine.error_bound <= tolerance and 0 < engine.kept_fraction <= 1
    bound = engine.error_bound + engine.rounding_bound
    mass = filtered(features, torch.ones_like(values[:, :1]), counts)
    error = (engine.apply(values) - filtered(features, values, counts)).abs()
    largest = torch.cat([v.abs().amax(0).expand(len(v), -1) for v in values.split(counts)])
    if precision == "fp16":  # values are scaled by the largest of a channel over all items
        largest = values.abs().amax(0)
    assert (error <= bound * mass * largest).all()


@pytest.mark.parametrize("tolerance", [1e-6, 1e-2])
def test_what_is_left_out_stays_below_the_tolerance(tolerance):
    """Brute force: the true mass of the skipped pairs of each point, against its true row sum."""
    counts = [400, 200]
    features = torch.cat([cloud("clusters", 400, 3), 6 * draw(200, 3, 1, seed=1)[0]])
    engine = TritonExactEngine(features, counts, tolerance)
    T = len(engine._size)
    kept = torch.zeros(T, T, dtype=torch.bool)
    offsets, columns = engine._offsets.tolist(), engine._columns.tolist()
    for row in range(T):
        partners = columns[offsets[row] : offsets[row + 1]]
        assert len(partners) == len(set(partners)) and row in partners
        kept[row, partners] = True
    assert torch.equal(kept, kept.T)  # left out in both directions or in none
    tile_of_point = torch.empty(600, dtype=torch.int64)
    tile_of_point[engine._source.flatten().long().cpu()] = torch.arange(T).repeat_interleave(64)
    item = torch.repeat_interleave(torch.tensor(counts))
    same = item[:, None] == item
    assert not kept[tile_of_point[~same.any(1)]].any()
    kernel = reference.kernel_matrix(features[None].double())[0].cpu() * same
    skipped = kernel * ~kept[tile_of_point][:, tile_of_point]
    fraction = skipped.sum(1) / kernel.sum(1)
    assert fraction.max() <= engine.error_bound <= tolerance
    assert engine.kept_fraction < 0.8  # otherwise nothing was put to the test
    pairs = kept[tile_of_point][:, tile_of_point].sum() / sum(n * n for n in counts)
    assert engine.kept_fraction == pytest.approx(float(pairs))
    assert not kept[tile_of_point[0], tile_of_point[-1]]  # items do not interact


def test_a_looser_tolerance_computes_less():
    features = 6 * draw(384, 2, 1)[0]
    fractions = [TritonExactEngine(features, [384], tolerance).kept_fraction for tolerance in (0.0, 1e-4, 0.3)]
    assert fractions[2] < fractions[1] < fractions[0]


def test_row_sums_are_bounded_from_below(monkeypatch):
    """And not by the trivial 1: the tolerance is relative to them."""
    found = []
    launch = exact_pairs._cut_kernel
    recorder = type(
        "Recorder", (), {"__getitem__": lambda self, grid: lambda *a, **k: (found.append(a[5]), launch[grid](*a, **k))}
    )()
    monkeypatch.setattr(exact_pairs, "_cut_kernel", recorder)
    for kind in ("narrow", "normal", "clusters", "far", "outliers"):
        features = cloud(kind, 200, 3) * (0.5 if kind == "narrow" else 1)
        engine = TritonExactEngine(features, [200])
        mass = filtered(features, torch.ones_like(features[:, :1]), [200])[:, 0]
        least = mass[engine._source.long()].amin(1)
        assert (found[-1] <= least).all()
        if kind == "narrow":
            assert (found[-1] > 0.5 * least).all()


@pytest.mark.parametrize("counts", [[300], [64, 65, 0, 1, 200], [128, 128]])
def test_tiles_are_a_permutation_of_each_item(counts):
    features = draw(sum(counts), 3, 1)[0].round()  # ties in every sort
    source, size, first, last = (tensor.cpu() for tensor in exact_pairs.split(features, counts))
    real = torch.arange(64) < size[:, None]
    assert sorted(source[real].tolist()) == list(range(sum(counts)))
    item_of_point = torch.repeat_interleave(torch.tensor(counts))
    tile = 0
    for item, count in enumerate(counts):
        tiles = -(-count // 64)
        assert size[tile : tile + tiles].tolist() == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
        assert (item_of_point[source[tile : tile + tiles].long()] == item).all()
        assert (first[tile : tile + tiles] == tile).all() and (last[tile : tile + tiles] == tile + tiles).all()
        tile += tiles
    assert tile == len(size)
    for row in range(len(size)):  # copies of the last point
        assert (source[row, size[row] :] == source[row, size[row] - 1]).all()


@pytest.mark.parametrize("wide_keys", [False, True])
def test_tiles_are_compact(wide_keys, monkeypatch):
    if wide_keys:  # as with so many tiles that 32 bits have no room for positions
        monkeypatch.setattr(exact_pairs, "MIN_BITS", 32)
    features = torch.rand(1024, 2, generator=torch.Generator().manual_seed(0)).to(device)
    source = exact_pairs.split(features, [1024]).source.long()
    width = features[source].amax(1) - features[source].amin(1)
    assert width.prod(1).mean() <= 1.15 / 16  # 16 tiles share a unit square


def test_is_its_own_adjoint_with_pairs_skipped():
    features, x, y = draw(300, 2, 3, scale=5)
    engine = TritonExactEngine(features, [300], 0.5, "float32")
    assert engine.kept_fraction < 0.9
    gap = (engine.apply(x) * y).double().sum() - (x * engine.apply(y, transpose=True)).double().sum()
    assert gap.abs() <= 1e-6 * (engine.apply(x.abs()) * y.abs()).sum()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stated_errors_of_the_precisions(precision):
    """Operands rounded as the matrix unit has them, everything else in float64: within half of what is stated."""
    features, values, _ = draw(200, 3, 5)
    kernel = reference.kernel_matrix(features[None].double())[0]
    truth, mass = kernel @ values.double(), kernel.sum(1, keepdim=True)
    if precision == "tf32":
        emulated = rounded(kernel) @ rounded(values)
    elif precision == "fp16":
        scale = exact._scale(values)
        assert ((values / scale).abs() <= 1).all() and torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
        emulated = (kernel * 2**14).half().double() @ (values / scale).half().double() * scale.double() / 2**14
    else:
        emulated = rounded(kernel, 21) @ rounded(values, 21)  # two parts of 11 bits each
    stated = exact.PRODUCT_ERROR[precision]
    assert ((emulated - truth).abs() <= stated * mass * values.abs().amax(0)).all()
    assert stated < TritonExactEngine(features, [200], 3e-4, precision).rounding_bound <= 3 * stated + 1e-4
    engine = TritonExactEngine(features, [200], 1e-9, precision)
    assert (engine.apply(values) - truth).norm() <= stated * truth.norm()


def test_tf32_values_are_rounded_before_the_matrix_unit_cuts_them():
    """One point: what comes out is the value as it went in, to the nearest of 10 bits."""
    values = draw(1, 1, 300)[1]
    engine = TritonExactEngine(torch.zeros(1, 2, device=device), [1], 1e-3, "tf32")
    out = engine.apply(values).double()
    assert (out - rounded(values)).abs().max() <= 2**-11 * values.abs().max()  # K = 1 may come as 1 + 2^-11
    kernel = out / rounded(values)
    assert ((kernel - 1).abs() <= 2**-11).all() and kernel.std() <= 1e-6


def test_fp16_keeps_small_entries_and_scales():
    """A kernel entry of 2^-26 and values of 10^-30 or 10^30, all far outside float16."""
    apart = math.sqrt(2 * 26 * math.log(2))
    features = torch.zeros(64, 1, device=device)
    features[1:, 0] = apart
    values = torch.zeros(64, 4, device=device)
    values[0] = torch.tensor([1.0, 1e-30, 1e30, 0.0])
    engine = TritonExactEngine(features, [64], 1e-12, "fp16")
    out = engine.apply(values)
    torch.testing.assert_close(out[1, :3], values[0, :3] * 2**-26, rtol=2e-3, atol=0)
    assert out[:, 3].eq(0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_gradients_of_any_size(precision, size):
    """In training a gradient comes divided by the number of pixels: nothing may underflow."""
    features, values, grad = draw(90, 3, 4)
    engine = TritonExactEngine(features, [90], 1e-9, precision)
    wanted = per_item(reference.feature_gradient, [90], features, values, size * grad)
    found = engine.feature_gradient(values, size * grad)
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    error = (engine.apply(size * grad) - filtered(features, size * grad, [90])).abs()
    mass = filtered(features, torch.ones_like(grad), [90])
    assert (error <= exact.PRODUCT_ERROR[precision] * mass * size * grad.abs().amax(0)).all()


def test_gradient_in_wide_tiles():
    """Points 10^5 apart in one tile: a sum of f_j minus a sum of f_i would have no digits left."""
    features, values, grad = draw(128, 2, 3)
    features[::3] += 1e5
    engine = TritonExactEngine(features, [128], 1e-9, "float32")
    assert (features[engine._source.long()].amax(1) - features[engine._source.long()].amin(1)).max() > 1e4
    wanted = per_item(reference.feature_gradient, [128], features, values, grad)
    assert (engine.feature_gradient(values, grad) - wanted).norm() <= 1e-5 * wanted.norm()


def test_nothing_but_its_own_item_reaches_a_point():
    counts = [70, 1, 0, 65]
    features, values, grad = draw(sum(counts), 2, 3)
    engine = TritonExactEngine(features, counts, 1e-9, "float32")
    before = engine.apply(values), engine.feature_gradient(values, grad)
    values[70], grad[70] = 1e6, 1e6
    after = engine.apply(values), engine.feature_gradient(values, grad)
    others = torch.arange(sum(counts), device=device) != 70
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[others], y[others])
    assert after[0][70].eq(1e6).all() and after[1][70].eq(0).all()


def test_a_nan_stays_with_those_who_hear_it():
    counts = [70, 65]
    features, values, _ = draw(135, 2, 3)
    values[0, 1] = math.nan
    for precision in ("float32", "tf32"):
        out = TritonExactEngine(features, counts, 1e-9, precision).apply(values)
        assert out[:70, 1].isnan().all() and out[70:].isfinite().all() and out[:, ::2].isfinite().all()


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_points_at_all(counts):
    engine = TritonExactEngine(torch.zeros(0, 3, device=device), counts)
    nothing = torch.zeros(0, 2, device=device)
    assert engine.apply(nothing).shape == (0, 2) and engine.feature_gradient(nothing, nothing).shape == (0, 3)
    assert engine.diagonal().shape == (0,) and engine.error_bound == 0 and engine.kept_fraction == 0
    assert math.isfinite(engine.rounding_bound)


def test_strided_values():
    features, values, grad = draw(70, 2, 6)
    engine = TritonExactEngine(features, [70], 1e-9)
    assert torch.equal(engine.apply(values[:, ::2]), engine.apply(values[:, ::2].contiguous()))
    gradient = engine.feature_gradient(values[:, ::2], grad[:, ::2])
    assert torch.equal(gradient, engine.feature_gradient(values[:, ::2].contiguous(), grad[:, ::2].contiguous()))


def test_engine_from_its_plan():
    counts = [130, 65]
    features, values, grad = draw(195, 3, 3)
    engine = TritonExactEngine(features, counts, 1e-3, "fp16")
    sizes = TritonExactEngine.plan_sizes(2 * 130, 3, 2)
    plan = []
    for tensor, (shape, dtype) in zip(engine.plan(), sizes, strict=True):
        assert tensor.dtype == (dtype or features.dtype)
        assert len(tensor) <= shape[0] and tensor.shape[1:] == torch.Size(shape[1:])
        plan.append(tensor)
    again = TritonExactEngine.from_plan(plan, features, counts, "fp16")
    assert torch.equal(again.apply(values), engine.apply(values))
    assert torch.equal(again.feature_gradient(values, grad), engine.feature_gradient(values, grad))


def test_room_for_pairs(monkeypatch):
    """Small lists are never counted on the host; a captured graph makes room for all pairs, or says that it cannot."""
    offsets = torch.tensor([0, 3, 5])
    assert exact_pairs._room(offsets, [128]) == 4
    monkeypatch.setattr(exact_pairs, "MAX_UNREAD", 3)
    assert exact_pairs._room(offsets, [128]) == 5
    captured = type("Offsets", (), {"is_cuda": True})()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert exact_pairs._room(captured, [128, 64]) == 5
    monkeypatch.setattr(exact_pairs, "MAX_CAPTURED", 4)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        exact_pairs._room(captured, [128, 64])


def test_what_ships_covers_what_is_launched():
    for target in TARGETS.values():
        builds = list(exact.builds(target))
        for D in (5, 16):
            shipped = {
                (
                    "fp16" if b.kernel is exact_split._split_filter_kernel else b.constants["PRECISION"],
                    b.constants["BLOCK_C"],
                )
                for b in builds
                if b.kernel in (exact._filter_kernel, exact_split._split_filter_kernel) and b.constants["D"] == D
            }
            for precision in PRECISIONS:
                assert {(precision, exact.block_of(C, D, precision, target)) for C in range(1, 301)} <= shipped
        for table in (exact.CONFIGS, exact.GRADIENT_CONFIGS, exact_split.CONFIGS):
            assert 1 <= len(table[target.name]) <= 6


@pytest.mark.parametrize("D", [1, 5, 6, 10, 11])
def test_split_features_give_distances_as_differences_do(D):
    """Colours of 0..255 at a bandwidth of 3, in tiles of a few bandwidths: |f|² in float32 would be off by 10^-3."""
    features = (85.0 + draw(190, D, 1, scale=1.5 / math.sqrt(D))[0]).contiguous()
    ones = torch.ones(190, 1, device=device)  # K itself is rounded to 10 bits, up and down, which a sum levels out
    engine = TritonExactEngine(features, [190], 1e-7, "fp16")
    assert bool((engine._near > 0).all())
    truth = filtered(features, ones, [190])
    assert ((engine.apply(ones) - truth).abs() / truth).max() < 2**-12


def test_near_and_wide_tiles_meet():
    features = cloud("outliers", 400, 3)
    engine = TritonExactEngine(features, [400], 1e-7, "fp16")
    partners = engine._offsets.diff()
    assert bool((engine._near > 0).any()) and bool((engine._near < partners).any())
    values = draw(400, 3, 5)[1]
    truth = filtered(features, values, [400])
    allowed = (engine.error_bound + engine.rounding_bound) * filtered(features, torch.ones_like(values), [400])
    assert bool(((engine.apply(values) - truth).abs() <= allowed * values.abs().max()).all())


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_as_small_and_as_large_as_float32(scale, precision):
    features, values, _ = draw(70, 2, 3)
    values = values / values.abs().max()
    features *= 100  # so that sums stay in range
    engine = TritonExactEngine(features, [70], 1e-6, precision)
    truth = filtered(features, values * scale, [70])
    assert ((engine.apply(values * scale) - truth).abs() <= 2**-9 * truth.abs().max()).all()
