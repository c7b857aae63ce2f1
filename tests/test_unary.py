import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crfnet import logits_from_labels, logits_from_probabilities

NAN = float("nan")


def test_probabilities_become_their_logarithms_and_zero_is_unlikely_instead_of_impossible():
    p = torch.tensor([0.0, 1e-9, 1e-5, 0.25, 1.0], dtype=torch.float64).view(1, 5, 1)
    expected = [math.log(1e-5)] * 3 + [math.log(0.25), 0.0]
    torch.testing.assert_close(logits_from_probabilities(p).flatten(), torch.tensor(expected, dtype=torch.float64))
    assert float(logits_from_probabilities(p, eps=1e-30).min()) == pytest.approx(math.log(1e-30))


@given(seed=st.integers(0, 2**31), C=st.integers(1, 21))
def test_softmax_gives_probabilities_back(seed, C):
    p = torch.randn(2, C, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    kept = p.clone()
    # no probability of such logits, within 6 or so of each other, is near 1e-5 / C
    torch.testing.assert_close(logits_from_probabilities(p, eps=1e-12).softmax(1), p)
    assert torch.equal(p, kept)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_halves_become_float32_before_they_are_clipped(dtype, result):
    logits = logits_from_probabilities(torch.tensor([[0.0], [1.0]], dtype=dtype), eps=1e-8)  # 0 in float16
    assert logits.dtype == result
    assert logits.flatten().tolist() == pytest.approx([math.log(1e-8), 0.0])


def test_gradients_reach_the_probabilities_that_are_not_clipped():
    p = torch.tensor([[0.0, 0.25, 1.0]], requires_grad=True)
    torch.set_warn_always(True)  # torch tells once a process that a tensor in a graph was made a number
    try:
        logits_from_probabilities(p).sum().backward()
    finally:
        torch.set_warn_always(False)
    assert p.grad.flatten().tolist() == [0.0, 4.0, 1.0]


def test_probabilities_need_not_sum_to_one_and_may_be_a_rounding_outside():
    assert logits_from_probabilities(torch.tensor([[0.2, 1.0 + 1e-6]])).isfinite().all()
    lowest = logits_from_probabilities(torch.tensor([[-1e-7, 1.0]])).min()  # what a bilinear resize may leave
    assert float(lowest) == pytest.approx(math.log(1e-5))
    assert logits_from_probabilities(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 4, 5)


BAD_PROBABILITIES = {
    "integers": ({"probabilities": torch.ones(1, 2, dtype=torch.int64)}, TypeError, "probabilities .*torch.int64"),
    "bool": ({"probabilities": torch.ones(1, 2) > 0}, TypeError, "probabilities .*torch.bool"),
    "array": ({"probabilities": np.ones((1, 2))}, TypeError, "probabilities must be a floating-point tensor"),
    "list": ({"probabilities": [[0.5, 0.5]]}, TypeError, "probabilities must be a floating-point tensor, got .*list"),
    "negative": ({"probabilities": torch.tensor([[-0.1, 1.0]])}, ValueError, "probabilities .* 0..1, got -0.1 to 1"),
    "above": ({"probabilities": torch.tensor([[0.0, 1.1]])}, ValueError, "probabilities .* 0..1, got 0 to 1.1.*logits"),
    "logits": ({"probabilities": torch.tensor([[-7.0, 8.0]])}, ValueError, "probabilities .* 0..1, got -7 to 8"),
    "nan": ({"probabilities": torch.tensor([[NAN, 1.0]])}, ValueError, "probabilities must lie in 0..1, got nan"),
    "inf": ({"probabilities": torch.tensor([[0.0, math.inf]])}, ValueError, "probabilities must .* to inf"),
    "eps 0": ({"eps": 0.0}, ValueError, "eps must lie between 0 and 1, got 0.0"),
    "eps 1": ({"eps": 1.0}, ValueError, "eps must lie between 0 and 1, got 1.0"),
    "eps nan": ({"eps": NAN}, ValueError, "eps must lie between 0 and 1, got nan"),
}


@pytest.mark.parametrize("case", BAD_PROBABILITIES)
def test_bad_probabilities_are_named(case):
    change, error, message = BAD_PROBABILITIES[case]
    with pytest.raises(error, match=message):
        logits_from_probabilities(**{"probabilities": torch.full((1, 2, 3), 0.5), **change})


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_get_their_confidence_and_the_others_share_the_rest(shape, dtype):
    labels = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = labels.clone()
    logits = logits_from_labels(labels, 4, confidence=0.7)
    assert logits.shape == (shape[0], 4, *shape[1:]) and logits.dtype == torch.float32
    p = logits.exp()
    torch.testing.assert_close(p.sum(1), torch.ones(shape))
    for a in range(4):
        torch.testing.assert_close(p[:, a], torch.where(labels == a, 0.7, 0.1))
    assert torch.equal(labels, kept)


@pytest.mark.parametrize(("ignore_index", "dtype"), [(255, torch.uint8), (-1, torch.int8), (2, torch.int64)])
def test_unknown_pixels_say_nothing(ignore_index, dtype):
    labels = torch.tensor([[0, 1, ignore_index]], dtype=dtype)
    p = logits_from_labels(labels, 3, ignore_index=ignore_index).exp()
    torch.testing.assert_close(p[0, :, 2], torch.full((3,), 1 / 3))
    torch.testing.assert_close(p[0, :, 1], torch.tensor([0.15, 0.7, 0.15]))
    all_unknown = logits_from_labels(torch.full((1, 2), ignore_index, dtype=dtype), 3, ignore_index=ignore_index)
    torch.testing.assert_close(all_unknown.exp(), torch.full((1, 3, 2), 1 / 3))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_labels_as_a_16_bit_png_holds_them(dtype):
    labels = torch.tensor([[0, 1, 255]]).to(dtype)
    assert torch.equal(logits_from_labels(labels, 2), logits_from_labels(labels.long(), 2))


def test_the_ends_of_confidence():
    labels = torch.tensor([[0, 1]])
    torch.testing.assert_close(logits_from_labels(labels, 4, confidence=0.25).exp(), torch.full((1, 4, 2), 0.25))
    nearly = logits_from_labels(labels, 2, confidence=1 - 1e-12)  # 1 in float32
    assert nearly.isfinite().all() and torch.equal(nearly.argmax(1), labels)
    for labels in (torch.tensor([[0]]), torch.tensor([[255]])):
        assert logits_from_labels(labels, 1).tolist() == [[[0.0]]]


BAD_LABELS = {
    "float": ({"labels": torch.zeros(1, 2, 3)}, TypeError, "labels must be an integer tensor, got .*torch.float32"),
    "bool": ({"labels": torch.zeros(1, 2, 3) > 0}, TypeError, "labels must be an integer tensor, got .*torch.bool"),
    "array": ({"labels": np.zeros((1, 2, 3), np.int64)}, TypeError, "labels must be an integer tensor"),
    "list": ({"labels": [[0, 1]]}, TypeError, "labels must be an integer tensor, got a list"),
    "complex": ({"labels": torch.zeros(1, 2, dtype=torch.cfloat)}, TypeError, "labels must be an integer .*complex64"),
    "no pixels' axis": ({"labels": torch.tensor([1])}, ValueError, r"labels must be \(B, .*got \(1,\)"),
    "scalar": ({"labels": torch.tensor(1)}, ValueError, r"labels must be \(B, .*got \(\)"),
    "above": ({"labels": torch.tensor([[0, 3]])}, ValueError, "labels must lie in 0..2 or be 255, got 0 to 3"),
    "below": ({"labels": torch.tensor([[-1, 2]])}, ValueError, "labels must lie in 0..2 or be 255, got -1 to 2"),
    "no ignore": ({"labels": torch.tensor([[255]]), "ignore_index": None}, ValueError, "labels must lie in 0..2.*255"),
    "classes": ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
    "low": ({"confidence": 0.3}, ValueError, r"confidence must lie in \[1 / 3, 1\), got 0.3"),
    "high": ({"confidence": 1.0}, ValueError, r"confidence must lie in \[1 / 3, 1\), got 1.0"),
    "nan": ({"confidence": NAN}, ValueError, "confidence must lie .*got nan"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_named(case):
    change, error, message = BAD_LABELS[case]
    with pytest.raises(error, match=message):
        logits_from_labels(**{"labels": torch.zeros(1, 2, 3, dtype=torch.int64), "num_classes": 3, **change})
