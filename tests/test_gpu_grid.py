"""The separable filter's Triton kernel, in the interpreter, against the definition in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crfnet.ops import reference
from crfnet.ops.gpu import grid
from crfnet.ops.gpu.grid import smooth
from crfnet.ops.reference import NORMALIZATIONS
from crfnet.ops.separable import GridFilter

EPS = torch.finfo(torch.float32).eps


pytestmark = pytest.mark.usefixtures("interpreter")


def band(n: int, theta: float, moment: int) -> Tensor:  # (n, n) float64
    r = torch.arange(n, dtype=torch.float64)[:, None] - torch.arange(n)
    return r.square() ** moment * torch.exp(-0.5 * (r / theta).square())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("moment", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "theta"),
    [
        ((1, 1, 1), 2.0),  # (before, n, inner), theta
        ((3, 63, 1), 3.0),
        ((1, 64, 21), 0.7),
        ((5, 65, 21), 3.0),  # columns of several items in one tile
        ((2, 130, 3), 20.0),
        ((1, 200, 2), 1.0),  # most of the matrix is left out
        ((1, 5, 300), 2.5),
        ((2, 3, 40), 1e9),  # as flat as can be, however long the axis
        ((67, 2, 1), 0.4),
    ],
)
def test_pass_is_the_definition(shape, theta, moment):
    x = draw(*shape).float()
    out = smooth(x, torch.tensor(theta, dtype=torch.float64), moment)
    matrix = band(shape[1], theta, moment)
    assert out.shape == x.shape
    # Row by row against the largest sum of magnitudes that can meet there. The radius leaves out 2^-24 of a row, theta
    # and distances are rounded once and then enter an exponent of at most 14 + 4 moment, and each product rounds.
    bound = (8 + 4 * moment) * EPS * (matrix @ x.double().abs()).amax((0, 2), keepdim=True)
    assert ((out - matrix @ x.double()).abs() <= bound).all()


def test_wide_items(monkeypatch):
    """Offsets in 64 bits give the same bits; they are taken from 2^31 on."""
    x, theta = draw(3, 70, 21).float(), torch.tensor(2.0, dtype=torch.float64)
    wanted = smooth(x, theta, 1)
    monkeypatch.setattr(grid, "_wide", lambda n, inner, columns: True)
    assert torch.equal(smooth(x, theta, 1), wanted)
    monkeypatch.undo()
    for n, inner, columns in [
        (1000, 500_000, 256),
        (10**6, 700, 256),
        (2**23, 1, 256),
        (375, 10_500, 256),
        (500, 21, 128),
    ]:
        last = (columns + inner - 2) // inner * n * inner + inner - 1 + (n - 1) * inner  # the farthest that can be read
        assert grid._wide(n, inner, columns) or last < 2**31
    assert not grid._wide(2048, 1024 * 171, 256)


@pytest.mark.parametrize("theta", [1e-30, 0.05, 0.08])
def test_tiny_bandwidths_leave_pixels_alone(theta):
    x = draw(2, 70, 3).float()
    assert torch.equal(smooth(x, torch.tensor(theta, dtype=torch.float64), 0), x)
    assert smooth(x, torch.tensor(theta, dtype=torch.float64), 1).abs().max() < 1e-30


def test_columns_do_not_mix():
    """A value that is not a number stays in its column."""
    x = torch.ones(2, 70, 3)
    x[0, 69, 1] = math.nan
    out = smooth(x, torch.tensor(1.0, dtype=torch.float64), 0)
    assert out[1].isfinite().all() and out[0, :, [0, 2]].isfinite().all() and out[0, 69, 1].isnan()


def definition(shape, theta, values, mask=None, normalization="none", remove_self=False) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
    features = (torch.stack(axes, -1).view(1, -1, len(shape)) / theta).expand(len(values), -1, -1)
    kernel = reference.kernel_matrix(features, mask)
    if remove_self:
        kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=1, dim2=2))
    n = kernel.sum(2, keepdim=True)
    values = values if mask is None else values.masked_fill(~mask[..., None], 0)
    return reference.normalized(
        lambda x: kernel @ x, values, n.clamp(min=reference.SELF_FLOOR) if remove_self else n, normalization
    )


def everything(function, values, theta, dtype):
    """Output and gradients to values and theta, for one fixed gradient of the output."""
    values, theta = values.to(dtype).requires_grad_(), theta.clone().requires_grad_()
    out = function(values, theta)
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape, seed=9).to(dtype)).sum(), (values, theta))]


MASK_AND_SELF = [(False, False), (True, False), (False, True), (True, True)]
ALL_FORMS = [(*pair, normalization) for pair in MASK_AND_SELF for normalization in NORMALIZATIONS]
EACH_FORM = [(*pair, normalization) for pair, normalization in zip(MASK_AND_SELF, NORMALIZATIONS, strict=True)]


@pytest.mark.parametrize(
    ("shape", "theta", "masked", "remove_self", "normalization"),
    [
        *(((5, 9), [1.3, 2.6], *form) for form in ALL_FORMS),
        *(((70,), [2.0], *form) for form in EACH_FORM),
        *(((2, 65), [0.9, 3.0], *form) for form in EACH_FORM),
        *(((3, 4, 2), [1.0, 2.0, 0.8], *form) for form in EACH_FORM),
    ],
)
def test_filter_and_all_gradients(shape, theta, masked, remove_self, normalization):
    values = draw(2, math.prod(shape), 2)
    mask = torch.rand(values.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    theta = torch.tensor(theta, dtype=torch.float64)
    how = {"mask": mask, "normalization": normalization, "remove_self": remove_self}
    exact = everything(lambda v, t: definition(shape, t, v, **how), values, theta, torch.float64)
    ours = everything(lambda v, t: GridFilter(shape, t, **how)(v), values, theta, torch.float32)

    def split(v, t):
        build = GridFilter(shape, t, **how)
        message, factor = build.message(v), build.factor(v)
        return message if factor is None else message * factor

    parts = everything(split, values, theta, torch.float32)
    # gradients to theta are sums over all pixels and channels, so their own size says little about rounding
    sums = values.numel() ** 0.5
    for out, piecewise, truth, terms in zip(ours, parts, exact, (1, 1, sums), strict=True):
        assert out.dtype == (torch.float64 if out.shape == theta.shape else torch.float32)
        bound = 32 * EPS * terms * truth.abs().max()  # three passes, two divisions, each of a few roundings
        assert (out - truth).abs().max() <= bound
        assert (piecewise - truth).abs().max() <= bound


def test_second_gradient_to_theta():
    """Moment 2, as the gradient of a gradient needs it."""
    values, theta = draw(1, 40, 2), torch.tensor([1.7], dtype=torch.float64)

    def twice(function, dtype):
        t = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(values.to(dtype), t).square().sum(), t, create_graph=True)
        return torch.autograd.grad(slope.sum(), t)[0]

    exact = twice(lambda v, t: definition((40,), t, v), torch.float64)
    torch.testing.assert_close(twice(lambda v, t: GridFilter((40,), t)(v), torch.float32), exact, rtol=1e-5, atol=0)


def test_large_bandwidth_gradient_keeps_float32():
    """r² reaches 10^4 here: the moment must not cost digits."""
    values = draw(1, 130, 2).abs()  # no cancelling
    theta = torch.tensor([60.0], dtype=torch.float64)
    exact = everything(lambda v, t: definition((130,), t, v).abs(), values, theta, torch.float64)
    ours = everything(lambda v, t: GridFilter((130,), t)(v).abs(), values, theta, torch.float32)
    for out, truth in zip(ours, exact, strict=True):
        assert (out - truth).abs().max() <= 16 * EPS * truth.abs().max() * (8 if out.shape == theta.shape else 1)


class NoReading(TorchDispatchMode):
    """Fails where the host would read a tensor's value, which on a GPU means to wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_nothing_is_read_by_the_host(masked, learnt):
    theta = torch.tensor([1.3, 2.6], dtype=torch.float64, requires_grad=learnt)
    mask = torch.arange(2 * 30).view(2, 30) % 7 > 0 if masked else None
    build = GridFilter((5, 6), theta, mask=mask, normalization="symmetric")
    values = draw(2, 30, 3).float().requires_grad_()
    with NoReading():
        build(values).sum().backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        theta.sum().item()


def test_float64_stays_with_the_plain_passes():
    values = draw(1, 42, 3)
    theta = torch.tensor(2.0, dtype=torch.float64)
    out = GridFilter((6, 7), theta, normalization="after")(values)
    torch.testing.assert_close(out, definition((6, 7), theta, values, None, "after"), rtol=1e-12, atol=1e-12)


def test_row_sums_are_kept_for_each_dtype_and_never_with_a_gradient():
    values = draw(1, 12, 1)
    build = GridFilter((3, 4), 1.5, normalization="after")
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert build(values.to(dtype)).dtype == dtype
    build = GridFilter((3, 4), 1.5, normalization="after")
    with torch.inference_mode():
        build(values.float())
    build(values.float().requires_grad_()).sum().backward()  # what inference mode keeps cannot be saved for backward
    theta = torch.tensor(1.5, requires_grad=True)
    build = GridFilter((3, 4), theta, normalization="after")
    with torch.no_grad():
        build(values.float())
    for _ in range(2):
        (slope,) = torch.autograd.grad(build(values.float()).square().sum(), theta)
        assert slope != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype):
    values = draw(1, 12, 2).to(dtype).requires_grad_()
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.crfnet.separable.default, (values, theta, [3, 4], [0, 1]))


def test_compiled_is_the_same():
    def run(function, values, theta):
        values, theta = values.clone().requires_grad_(), theta.clone().requires_grad_()
        out = function(values, theta)
        return [out.detach(), *torch.autograd.grad((out * out).sum(), (values, theta))]

    def function(values, theta):
        build = GridFilter((3, 4), theta, normalization="after")
        return build.message(values) * build.factor(values)

    values, theta = draw(2, 12, 3).float(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(run(compiled, values, theta), run(function, values, theta), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_empty_batch():
    assert GridFilter((3, 4), 1.0, normalization="after")(torch.empty(0, 12, 2)).shape == (0, 12, 2)


@pytest.mark.parametrize("theta", [-3.0, 0.0, math.nan, math.inf])
def test_a_bandwidth_that_is_none_ends_as_nan(theta):
    assert smooth(draw(1, 9, 4).float(), torch.tensor(theta, dtype=torch.float64), 0).isnan().all()
