import math

import pytest
import torch
from torch import Tensor

from crfnet.ops import reference
from crfnet.ops.reference import NORMALIZATIONS


def draw(B: int, N: int, D: int, C: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, N, k, generator=generator, dtype=torch.float64) for k in (D, C, C)]


def draw_mask(B: int, N: int, seed: int = 0) -> Tensor:
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_formula_written_out_in_scalars(normalization, masked):
    features, values, _ = draw(2, 6, 3, 2)
    mask = draw_mask(2, 6) if masked else None
    out = reference.gaussian_filter(features, values, mask, normalization)
    for b in range(2):
        takes_part = [i for i in range(6) if mask is None or mask[b, i]]

        def kernel(i, j, f=features[b]):
            return math.exp(-sum((float(x) - float(y)) ** 2 for x, y in zip(f[i], f[j], strict=True)) / 2)

        n = {i: sum(kernel(i, j) for j in takes_part) for i in takes_part}
        receive = {"none": 0, "before": 0, "after": 1, "symmetric": 0.5}[normalization]
        send = {"none": 0, "before": 1, "after": 0, "symmetric": 0.5}[normalization]
        for i in range(6):
            for c in range(2):
                wanted = 0.0
                if i in takes_part:
                    wanted = sum(kernel(i, j) * float(values[b, j, c]) / n[j] ** send for j in takes_part)
                    wanted /= n[i] ** receive
                assert float(out[b, i, c]) == pytest.approx(wanted, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_values_and_features(normalization, masked):
    features, values, _ = draw(2, 5, 2, 3)
    mask = draw_mask(2, 5) if masked else None
    inputs = (features.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradcheck(lambda f, v: reference.gaussian_filter(f, v, mask, normalization), inputs)


def test_second_gradient():
    features, values, _ = draw(1, 4, 2, 2)
    inputs = (features.requires_grad_(), values.requires_grad_())
    assert torch.autograd.gradgradcheck(reference.gaussian_filter, inputs)


@pytest.mark.parametrize(("N", "D", "C"), [(1, 1, 1), (7, 1, 300), (20, 5, 21), (9, 16, 2)])
def test_closed_form_gradients_are_autograds(N, D, C):
    features, values, grad = draw(2, N, D, C)
    features.requires_grad_(), values.requires_grad_()
    d_features, d_values = torch.autograd.grad(reference.gaussian_filter(features, values), (features, values), grad)
    with torch.no_grad():
        torch.testing.assert_close(reference.values_gradient(features, grad), d_values, rtol=1e-12, atol=1e-12)
        closed = reference.feature_gradient(features, values, grad)
        torch.testing.assert_close(closed, d_features, rtol=1e-11, atol=1e-11)


def test_masked_pixels_do_not_exist():
    features, values, grad = draw(1, 12, 3, 4)
    mask = draw_mask(1, 12)
    inside = mask[0]
    for normalization in NORMALIZATIONS:
        out = reference.gaussian_filter(features, values, mask, normalization)
        alone = reference.gaussian_filter(features[:, inside], values[:, inside], None, normalization)
        torch.testing.assert_close(out[:, inside], alone, rtol=1e-13, atol=1e-13)
        assert not out[:, ~inside].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_data_may_be_nan_and_gradients_stay_clean(normalization):
    features, values, grad = (x.float() for x in draw(1, 8, 2, 3))
    mask = draw_mask(1, 8)
    features[~mask], values[~mask] = math.nan, math.nan
    features.requires_grad_(), values.requires_grad_()
    out = reference.gaussian_filter(features, values, mask, normalization)
    assert not out[~mask].any() and out.isfinite().all()
    for gradient in torch.autograd.grad(out, (features, values), grad):
        assert gradient.isfinite().all() and not gradient[~mask].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_nothing_takes_part(normalization):
    features, values, grad = (x.float().requires_grad_() for x in draw(1, 4, 2, 3))
    out = reference.gaussian_filter(features, values, torch.zeros(1, 4, dtype=torch.bool), normalization)
    assert not out.any()
    for gradient in torch.autograd.grad(out, (features, values), grad):
        assert not gradient.any()


def test_what_the_normalisations_preserve():
    features, values, _ = draw(1, 30, 3, 2)
    ones = torch.ones_like(values)
    after = reference.gaussian_filter(features, ones, normalization="after")
    torch.testing.assert_close(after, ones, rtol=1e-13, atol=0)  # constants: rows sum to 1
    before = reference.gaussian_filter(features, values, normalization="before")
    torch.testing.assert_close(before.sum(1), values.sum(1), rtol=1e-12, atol=1e-12)  # totals: columns sum to 1
    identity = torch.eye(30, dtype=torch.float64)[None]
    symmetric = reference.gaussian_filter(features, identity, normalization="symmetric")
    torch.testing.assert_close(symmetric, symmetric.mT)
    assert torch.linalg.eigvalsh(symmetric[0]).max() == pytest.approx(1, abs=1e-12)  # similar to the rows-sum-to-1 one


def test_an_isolated_pixel_hears_only_itself():
    features, values, _ = draw(1, 5, 2, 3)
    features[:, 0] = 1e6
    for normalization in NORMALIZATIONS:
        out = reference.gaussian_filter(features, values, normalization=normalization)
        torch.testing.assert_close(out[:, 0], values[:, 0])


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26])
def test_chunks_are_the_definition(chunk_bytes):
    features, values, _ = draw(2, 37, 4, 3)
    whole = reference.gaussian_filter(features, values)
    rows = torch.tensor([36, 0, 5, 5])
    for f, v, wanted in ((features, values, whole), (features[0], values[0], whole[0])):
        got = reference.gaussian_filter_chunked(f, v, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)
        got = reference.gaussian_filter_chunked(f, v, rows, chunk_bytes)
        torch.testing.assert_close(got, wanted[..., rows, :], rtol=1e-13, atol=1e-13)


def test_errors_name_the_argument():
    features, values, _ = draw(1, 3, 2, 1)
    with pytest.raises(ValueError, match="normalization must be one of .* got 'both'"):
        reference.gaussian_filter(features, values, normalization="both")
    with pytest.raises(ValueError, match="n must be the row sums"):
        reference.normalized(lambda x: x, values, None, "after")
