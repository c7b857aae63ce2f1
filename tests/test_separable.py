import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crfnet.ops import reference
from crfnet.ops.reference import NORMALIZATIONS
from crfnet.ops.separable import GridFilter


def positions(shape: tuple[int, ...]) -> Tensor:  # (1, N, axes) float64, row-major pixel indices
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
    return torch.stack(axes, -1).view(1, -1, len(shape))


def draw(shape: tuple[int, ...], B: int = 1, C: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    N = math.prod(shape)
    values = torch.randn(B, N, C, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, N, generator=generator) > 0.3
    return values, mask


def definition(shape, theta, values, mask=None, normalization="none") -> Tensor:
    features = (positions(shape) / torch.as_tensor(theta)).expand(len(values), -1, -1)
    return reference.gaussian_filter(features, values, mask, normalization)


# thetas so small that only the pixel itself is left, about the block size, and far larger than the image
@pytest.mark.parametrize("theta", [0.05, 1.0, 3.0, 1000.0])
@pytest.mark.parametrize("shape", [(1,), (130,), (13, 29), (50, 3), (1, 60), (4, 5, 6), (30, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_definition(shape, theta, masked):
    values, mask = draw(shape, B=2)
    out = GridFilter(shape, theta, mask=mask if masked else None)(values)
    truth = definition(shape, theta, values, mask if masked else None)
    # Entries left out of the band are below half a unit of rounding of the diagonal 1, at most N of them.
    atol = 2 * torch.finfo(torch.float64).eps * (10 + values[0].numel()) * values.abs().max()
    torch.testing.assert_close(out, truth, rtol=0, atol=float(atol))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_normalisations_and_gradients_to_values_and_bandwidths(normalization, masked):
    shape = (5, 4)
    values, mask = draw(shape, B=2)
    mask = mask if masked else None
    theta = torch.tensor([1.3, 2.6], dtype=torch.float64, requires_grad=True)
    values.requires_grad_()

    def ours(theta, values):
        return GridFilter(shape, theta, normalization=normalization, mask=mask)(values)

    truth = definition(shape, theta, values, mask, normalization)
    torch.testing.assert_close(ours(theta, values), truth, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (theta, values))
    grad = torch.randn_like(values)
    for got, wanted in zip(
        torch.autograd.grad(ours(theta, values), (theta, values), grad),
        torch.autograd.grad(truth, (theta, values), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_second_gradient():
    values, _ = draw((3, 4))
    theta = torch.tensor([1.3, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda t, v: GridFilter((3, 4), t, normalization="after")(v), (theta, values.requires_grad_())
    )


def test_gradient_to_one_shared_bandwidth_over_a_wide_image():
    """A band narrower than the axis: the cut must leave room for the tail of r² exp(-r²/2 theta²) too."""
    shape = (9, 120)
    values, _ = draw(shape, C=3)
    theta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(GridFilter(shape, theta)(values), theta, grad)
    (wanted,) = torch.autograd.grad(definition(shape, theta, values), theta, grad)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("shape", "C"), [((70, 90), 1), ((40, 30), 300), ((375, 12), 21)])
def test_float32_costs_no_more_than_its_rounding(shape, C):
    values, _ = draw(shape, C=C)
    truth = GridFilter(shape, 3.0)(values)
    out = GridFilter(shape, 3.0)(values.float())
    # 2 passes of dot products over a band of 35 (Cauchy-Schwarz: |K||v| bounds every partial sum), input rounding
    bound = 2 * 40 * 2**-24 * GridFilter(shape, 3.0)(values.abs())
    assert ((out - truth).abs() <= bound).all()


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 3000),
    theta=st.floats(0.1, 100),
    seed=st.integers(0, 2**31),
)
def test_is_its_own_adjoint(shape, theta, seed):
    x, mask = draw(tuple(shape), B=2, seed=seed)
    y, _ = draw(tuple(shape), B=2, seed=seed + 1)
    for normalization in ("none", "symmetric"):
        K = GridFilter(shape, theta, normalization=normalization, mask=mask)
        assert abs((K(x) * y).sum() - (x * K(y)).sum()) <= 1e-11 * (K(x.abs()) * y.abs()).sum() + 1e-14


def test_constant_image_stays_constant():
    ones = torch.ones(1, 30 * 50, 4, dtype=torch.float64)
    torch.testing.assert_close(GridFilter((30, 50), 2.5, normalization="after")(ones), ones, rtol=1e-14, atol=0)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_data_may_be_nan(normalization):
    values, mask = draw((6, 7), B=2)
    values[~mask] = math.nan
    values.requires_grad_()
    out = GridFilter((6, 7), 1.5, normalization=normalization, mask=mask)(values)
    assert out.isfinite().all() and not out[~mask].any()
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert gradient.isfinite().all() and not gradient[~mask].any()


def test_nothing_takes_part():
    values, mask = draw((3, 3))
    for normalization in NORMALIZATIONS:
        assert not GridFilter((3, 3), 1.0, normalization=normalization, mask=mask & False)(values).any()


def test_values_need_not_be_contiguous():
    values, _ = draw((7, 8), B=2, C=3)
    strided = values.mT.contiguous().mT
    assert not strided.is_contiguous()
    torch.testing.assert_close(GridFilter((7, 8), 2.0)(strided), GridFilter((7, 8), 2.0)(values), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "shape must have 1 to 3 axes"),
        ({"shape": (2, 2, 2, 2)}, "shape must have 1 to 3 axes"),
        ({"shape": (3, 0)}, "shape must have 1 to 3 axes of at least 1"),
        ({"theta": 0.0}, "theta must be positive and finite, got 0.0"),
        ({"theta": [1.0, -2.0]}, "theta must be positive"),
        ({"theta": math.nan}, "theta must be positive"),
        ({"theta": [1.0, 2.0, 3.0]}, "theta must be one number or 2"),
        ({"normalization": "both"}, "normalization must be one of"),
        ({"mask": torch.ones(1, 12)}, r"mask must be \(B, 12\) bool, got \(1, 12\) torch.float32"),
        ({"mask": torch.ones(1, 11, dtype=torch.bool)}, r"mask must be \(B, 12\) bool, got \(1, 11\)"),
    ],
)
def test_construction_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        GridFilter(**{"shape": (3, 4), "theta": 1.0} | arguments)


@pytest.mark.parametrize("values", [torch.ones(12, 2), torch.ones(1, 13, 2), torch.ones(3, 12, 2)])
def test_values_of_the_wrong_shape(values):
    mask = torch.ones(2, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"values must be \(2, 12, C\) for the grid \(3, 4\), got"):
        GridFilter((3, 4), 1.0, mask=mask)(values)


def test_values_of_the_wrong_dtype():
    with pytest.raises(ValueError, match="values must be float32 or float64, got torch.float16"):
        GridFilter((3, 4), 1.0)(torch.ones(1, 12, 2, dtype=torch.float16))


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
def test_pieces_are_those_of_the_whole_even_where_theta_is_learnt(normalization):
    values = torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(0))
    grid = GridFilter((12, 5), torch.tensor(1.5, dtype=torch.float64, requires_grad=True), normalization=normalization)
    with torch.no_grad():
        whole, receive = grid(values).flatten(0, 1), grid.send(values)
        for start, stop in [(0, 15), (15, 60), (60, 120)]:
            received, factor = receive(start, stop)
            torch.testing.assert_close(received if factor is None else received * factor, whole[start:stop])


def test_backward_under_autocast_is_backward_without():
    values, theta = torch.rand(1, 30, 4, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    out = GridFilter((5, 6), theta, normalization="after")(values).square().sum()
    expected = torch.autograd.grad(out, (values, theta), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out, (values, theta))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
