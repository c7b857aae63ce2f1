"""Kernels and parameters: where they start, what is learnt, what stays positive, and what survives being stored."""

import copy
import gc
import io
import itertools
import pickle
import threading

import pytest
import torch
from torch import Tensor

from crfnet import DenseCRF, Kernel
from crfnet.ops import GaussianFilter, GridFilter
from crfnet.ops.exact import ExactEngine

EVERYTHING = ("weights", "compatibility", "bandwidths")
WEIGHT = {"scalar": "log_weight", "per_class": "log_weight", "full": "weight"}
NAN, INF = float("nan"), float("inf")


def draw(seed=0, B=2, C=3, S=(4, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, *S, generator=generator), 255 * torch.rand(B, 3, *S, generator=generator)


def subsets():
    return [c for n in range(4) for c in itertools.combinations(EVERYTHING, n)]


# --- where they start


@pytest.mark.parametrize("form", ["scalar", "per_class", "full"])
def test_parameters_start_where_they_are_told(form):
    weight = {"scalar": 1.7, "per_class": torch.tensor([0.5, 1.0, 4.0]), "full": torch.randn(3, 3)}[form]
    compatibility = {"scalar": "potts", "per_class": torch.tensor([0.3, 1.0, 2.0]), "full": torch.randn(3, 3)}[form]
    crf = DenseCRF(
        3,
        theta_alpha=67.0,
        theta_beta=(3.0, 13.0, 0.2),
        theta_gamma=0.5,
        spatial_weight=weight,
        weights=form,
        compatibility=compatibility,
        kernels=[Kernel("depth", 2.5, theta_guide=0.1, guide="depth")],
    )
    spatial, bilateral, depth = crf.kernels.values()
    assert list(crf.kernels) == ["spatial", "bilateral", "depth"]
    # exp(log x) in float32: the logarithm, below 8, is rounded to 5e-7
    close = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(spatial.weights(), torch.as_tensor(weight), **close)
    eye = {"scalar": torch.tensor(5.0), "per_class": torch.full((3,), 5.0), "full": 5 * torch.eye(3)}[form]
    torch.testing.assert_close(bilateral.weights(), eye, **close)
    torch.testing.assert_close(bilateral.theta_position, torch.tensor(67.0), **close)
    torch.testing.assert_close(bilateral.theta_guide, torch.tensor([3.0, 13.0, 0.2]), **close)
    torch.testing.assert_close(spatial.theta_position, torch.tensor(0.5), **close)
    torch.testing.assert_close(depth.theta_guide, torch.tensor(0.1), **close)
    assert spatial.theta_guide is None and spatial.guide is None
    assert depth.theta_position is None and depth.guide == "depth"
    mu = compatibility if form == "full" else (1 - torch.eye(3)) * (1.0 if form == "scalar" else compatibility)
    torch.testing.assert_close(crf.compatibility, mu, **close)


def test_tensors_given_are_copied():
    """Two kernels started from one matrix are two parameters, and training writes into neither's source."""
    start, compatibility = 3 * torch.eye(3), 1 - torch.eye(3)
    kept = start.clone(), compatibility.clone()
    crf = DenseCRF(3, spatial_weight=start, bilateral_weight=start, compatibility=compatibility)
    with torch.no_grad():
        crf.kernels["spatial"].weight.add_(1.0)
        crf.compatibility_matrix.add_(1.0)
    assert torch.equal(crf.kernels["bilateral"].weight, kept[0])
    assert torch.equal(start, kept[0]) and torch.equal(compatibility, kept[1])


@pytest.mark.parametrize("form", ["scalar", "per_class", "full"])
def test_a_fixed_weight_carries_nobody_elses_gradient(form):
    start = {"scalar": torch.tensor(3.0), "per_class": torch.full((3,), 3.0), "full": 3 * torch.eye(3)}[form]
    crf = DenseCRF(3, spatial_weight=start.requires_grad_(), weights=form, learn=())
    assert not any(buffer.requires_grad for buffer in crf.buffers())
    assert not crf(*draw()).requires_grad


def test_a_fixed_weight_of_zero_leaves_the_kernel_out():
    """Its guide may then be anything that passes the door, and the compatibility can still be read."""
    logits, image = draw()
    crf = DenseCRF(3, weights="scalar", compatibility="potts", learn=(), bilateral_weight=0.0)
    assert torch.equal(crf(logits, image), crf(logits, 255 - image))
    assert not torch.equal(crf(logits, image), logits)
    crf = DenseCRF(3, weights="scalar", compatibility="potts", learn=(), bilateral_weight=0.0, spatial_weight=0.0)
    assert torch.equal(crf.compatibility, 1 - torch.eye(3))


# --- what is learnt


@pytest.mark.parametrize("learn", subsets())
@pytest.mark.parametrize("weights", ["scalar", "per_class", "full"])
@pytest.mark.parametrize("compatibility", ["potts", "per_class", "full"])
def test_learn_says_exactly_what_is_a_parameter(weights, compatibility, learn):
    crf = DenseCRF(3, weights=weights, compatibility=compatibility, learn=learn, kernels=[Kernel("k", 1.0, 2.0)])
    groups = {
        "weights": {f"kernels.{k}.{WEIGHT[weights]}" for k in ("spatial", "bilateral", "k")},
        "bandwidths": {f"kernels.{k}.log_theta_position" for k in ("spatial", "bilateral", "k")}
        | {"kernels.bilateral.log_theta_guide"},
        "compatibility": {
            "potts": set(),
            "per_class": {"log_compatibility"},
            "full": {"compatibility_matrix"},
        }[compatibility],
    }
    assert {name for name, _ in crf.named_parameters()} == set().union(*(groups[what] for what in learn))
    assert set(crf.state_dict()) == set().union(*groups.values())  # what is fixed is stored all the same


def test_learn_takes_one_word_or_any_collection():
    assert [name for name, _ in DenseCRF(2, learn="compatibility").named_parameters()] == ["compatibility_matrix"]
    assert len(list(DenseCRF(2, learn={"weights"}).parameters())) == 2


@pytest.mark.parametrize("weights", ["scalar", "per_class"])
@pytest.mark.parametrize("direction", [-1, 1])
def test_positive_by_construction(weights, direction):
    """Steps that would carry a weight, stored as it is, far below 0: the loss rewards a smaller, then a larger one."""
    logits, image = draw()
    crf = DenseCRF(
        3,
        theta_beta=60.0,
        theta_alpha=2.0,
        weights=weights,
        compatibility="per_class",
        learn=EVERYTHING,
        engine="exact",
    )
    loss = direction * crf(logits, image).softmax(1).square().sum()
    loss.backward()
    steepest = max(float(p.grad.abs().max()) for p in crf.parameters())
    optimiser = torch.optim.SGD(crf.parameters(), lr=20.0 / steepest)  # logarithms move by up to 20
    start = {name: p.detach().exp() for name, p in crf.named_parameters()}
    naive_step = {
        name: p.detach().exp() - optimiser.param_groups[0]["lr"] * p.grad / p.detach().exp()
        for name, p in crf.named_parameters()
    }
    assert any((moved < 0).any() for moved in naive_step.values()), "the step must be absurd to prove anything"
    for _ in range(3):
        optimiser.step()
        for kernel in crf.kernels.values():
            for value in (kernel.weights(), kernel.theta_position, kernel.theta_guide):
                assert value is None or (value.isfinite().all() and (value > 0).all())
        off_diagonal = crf.compatibility[~torch.eye(3, dtype=torch.bool)]
        assert (off_diagonal > 0).all() and off_diagonal.isfinite().all()
    assert any(not torch.equal(p.exp(), start[name]) for name, p in crf.named_parameters())


def test_training_finds_the_weights_that_made_the_marginals():
    """The layer as it is used; 60 steps of Adam, each at most 0.1 in the logarithm, which has 1.05 to go."""
    logits, image = draw(S=(6, 7))

    def crf(spatial: float, bilateral: float) -> DenseCRF:
        weights = {"weights": "scalar", "spatial_weight": spatial, "bilateral_weight": bilateral}
        return DenseCRF(3, theta_alpha=3.0, theta_beta=60.0, compatibility="potts", learn="weights", **weights)

    target, student = crf(1.0, 2.0)(logits, image).detach().softmax(1), crf(2.0, 0.7)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (target * (target.log() - student(logits, image).log_softmax(1))).sum(1).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
    found = [float(kernel.weights().detach()) for kernel in student.kernels.values()]
    assert found == pytest.approx([1.0, 2.0], rel=0.1)


# --- what survives


def loaded(crf: DenseCRF, how: str) -> DenseCRF:
    if how == "deepcopy":
        return copy.deepcopy(crf)
    if how == "pickle":
        return pickle.loads(pickle.dumps(crf))
    file = io.BytesIO()
    torch.save(crf.state_dict(), file)
    file.seek(0)
    fresh = DenseCRF(3, weights="per_class", compatibility="per_class", kernels=[Kernel("k", 1.0, 2.0)])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_computes_the_same_and_is_its_own(how):
    logits, image = draw()
    crf = DenseCRF(
        3,
        weights="per_class",
        compatibility=torch.tensor([1.0, 2.0, 3.0]),
        theta_beta=50.0,
        learn=EVERYTHING,
        kernels=[Kernel("k", torch.tensor([1.0, 2.0, 3.0]), 4.0)],
    )
    other = loaded(crf, how)
    expected = crf(logits, image)
    assert torch.equal(other(logits, image), expected)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1.0)
    assert torch.equal(crf(logits, image), expected)
    assert not torch.equal(other(logits, image), expected)


def test_a_state_dict_of_another_form_is_refused():
    with pytest.raises(RuntimeError, match="log_weight"):
        DenseCRF(3, weights="scalar").load_state_dict(DenseCRF(3).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        DenseCRF(3).load_state_dict(DenseCRF(4).state_dict())


def test_double_and_meta():
    crf = DenseCRF(3, learn=("weights",))
    assert {tensor.dtype for tensor in copy.deepcopy(crf).double().state_dict().values()} == {torch.float64}
    meta = crf.to("meta")
    assert {tensor.device.type for tensor in meta.state_dict().values()} == {"meta"}
    assert meta.compatibility.shape == (3, 3) and meta.kernels["spatial"].weights().device.type == "meta"
    with pytest.raises((ValueError, RuntimeError), match="(?i)meta"):
        meta(*draw())


def test_functional_call_learns_what_the_module_learns():
    logits, image = draw()
    crf = DenseCRF(3, spatial_weight=0.0)  # learnable, though it starts at zero
    values = {name: p.detach().clone().requires_grad_() for name, p in crf.named_parameters()}
    torch.func.functional_call(crf, values, (logits, image)).square().sum().backward()
    crf(logits, image).square().sum().backward()
    for name, p in crf.named_parameters():
        assert values[name].grad is not None, name
        torch.testing.assert_close(values[name].grad, p.grad)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_nothing_is_kept_after_use(checkpoint):
    logits, image = draw()
    crf = DenseCRF(3, learn=EVERYTHING, checkpoint=checkpoint)

    def filters() -> int:
        kinds = (GaussianFilter, GridFilter, ExactEngine)
        return sum(type(thing) in kinds for thing in gc.get_objects())

    gc.collect()
    before = filters()
    gc.disable()  # what only the collector can free is held by a cycle
    try:
        out = crf(logits, image)
        assert filters() > before  # what backward needs
        out.sum().backward()
        del out
        crf.energy(logits.argmax(1), logits, image)
        crf.diagnose(logits, image)
        with torch.no_grad():
            crf(logits, image)
        assert filters() == before
    finally:
        gc.enable()


def test_a_filter_first_used_without_gradients_has_them_later():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 20, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    values, weight = torch.rand(2, 1, 20, 1, generator=generator, dtype=torch.float64)
    used = GaussianFilter(features, normalization="after")
    with torch.no_grad():
        used(values)
    fresh = GaussianFilter(features, normalization="after")
    gradients = [torch.autograd.grad((weight * f(values)).sum(), features)[0] for f in (used, fresh)]
    torch.testing.assert_close(*gradients)


def test_threads_share_a_module():
    crf = DenseCRF(3, theta_beta=60.0)
    problems = [draw(seed=seed) for seed in range(8)]
    expected = [crf(*problem) for problem in problems]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad() if i % 2 else torch.enable_grad():
            got[i] = crf(*problems[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        torch.testing.assert_close(got[i].log_softmax(1), expected[i].log_softmax(1), rtol=0, atol=1e-4)
        assert got[i].requires_grad == (i % 2 == 0)


# --- bad input

BAD_MODULES = {
    "no classes": ({"num_classes": 0}, ValueError, "num_classes must be a whole number, 1 or more, got 0"),
    "classes": ({"num_classes": 2.5}, (TypeError, ValueError), "num_classes must be .*2.5"),
    "theta_alpha 0": ({"theta_alpha": 0.0}, ValueError, "theta_alpha must be positive.*got 0"),
    "theta_gamma": ({"theta_gamma": -1.0}, ValueError, "theta_gamma must be positive.*got -1"),
    "theta_beta": ({"theta_beta": (3.0, -3.0)}, ValueError, r"theta_beta must be positive.*got \(3.0, -3.0\)"),
    "theta nan": ({"theta_beta": NAN}, ValueError, "theta_beta must be positive.*got nan"),
    "theta inf": ({"theta_gamma": INF}, ValueError, "theta_gamma must be positive .*got inf"),
    "theta tiny": ({"theta_gamma": 1e-50}, ValueError, "theta_gamma must be positive"),
    "no theta_beta": ({"theta_beta": ()}, ValueError, "theta_beta must .*got "),
    "weight shape": ({"spatial_weight": torch.ones(2)}, ValueError, r"'spatial' must be .*\(3, 3\).*got \(2,\)"),
    "weight nan": ({"bilateral_weight": NAN}, ValueError, "weight of kernel 'bilateral' must be a finite.*got nan"),
    "weight inf": ({"spatial_weight": torch.full((3, 3), INF)}, ValueError, "weight of kernel 'spatial' .*got .*inf"),
    "weight zero": ({"spatial_weight": 0.0, "weights": "scalar"}, ValueError, "'spatial' must be positive.*got 0.0"),
    "weight negative": ({"spatial_weight": -1.0, "weights": "per_class"}, ValueError, "'spatial' must be positive.*-1"),
    "fixed negative": ({"spatial_weight": -1.0, "weights": "scalar", "learn": ()}, ValueError, "'spatial' .*0 or more"),
    "weights": ({"weights": "diagonal"}, ValueError, "weights must be one of .*got 'diagonal'"),
    "compatibility": ({"compatibility": "pots"}, ValueError, "compatibility must be one of .*got 'pots'"),
    "compatibility shape": ({"compatibility": torch.ones(3, 2)}, ValueError, r"compatibility .*got \(3, 2\)"),
    "compatibility nan": (
        {"compatibility": torch.full((3,), NAN)},
        ValueError,
        "compatibility must be finite.*got .*nan",
    ),
    "compatibility 0": ({"compatibility": torch.zeros(3)}, ValueError, "compatibility .* must be positive, got"),
    "compatibility list": ({"compatibility": [1.0]}, (TypeError, ValueError), "compatibility must be one of"),
    "learn": ({"learn": ("weight",)}, ValueError, "learn must be one of .*got 'weight'"),
    "learn word": ({"learn": "all"}, ValueError, "learn must be one of .*got 'all'"),
    "iterations": ({"num_iterations": 2.5}, ValueError, "num_iterations must be a whole number.*got 2.5"),
    "iterations negative": ({"num_iterations_eval": -1}, ValueError, "num_iterations_eval must be .*got -1"),
    "iterations none": ({"num_iterations": None}, (TypeError, ValueError), "num_iterations must be .*got None"),
    "iterations nan": ({"num_iterations": NAN}, ValueError, "num_iterations must be .*got nan"),
    "damping": ({"damping": 1.0}, ValueError, r"damping must lie in \[0, 1\), got 1.0"),
    "damping nan": ({"damping": NAN}, ValueError, r"damping must lie in \[0, 1\), got nan"),
    "label_tolerance": ({"label_tolerance": -0.1}, ValueError, r"label_tolerance must lie in \[0, 1\), got -0.1"),
    "normalization": ({"normalization": "l2"}, ValueError, "normalization must be one of .*got 'l2'"),
    "engine": ({"engine": "fast"}, ValueError, "engine must be one of .*got 'fast'"),
    "image_range order": ({"image_range": (1.0, 0.0)}, ValueError, r"image_range must be .*got \(1.0, 0.0\)"),
    "image_range length": ({"image_range": (0.0,)}, ValueError, r"image_range must be .*got \(0.0,\)"),
    "image_range inf": ({"image_range": (0.0, INF)}, ValueError, r"image_range must be .*got \(0.0, inf\)"),
    "image_range nan": ({"image_range": (0.0, NAN)}, ValueError, r"image_range must be .*got \(0.0, nan\)"),
    "kernel twice": ({"kernels": [Kernel("k", 1.0, 1.0)] * 2}, ValueError, "kernels must have names of .*'k', 'k'"),
    "kernel spatial": ({"kernels": [Kernel("spatial", 1.0, 1.0)]}, ValueError, "kernels must have names of their own"),
    "kernel weight": ({"kernels": [Kernel("k", torch.ones(4), 1.0)]}, ValueError, r"weight of kernel 'k' .*got \(4,\)"),
}


@pytest.mark.parametrize("case", BAD_MODULES)
def test_bad_modules_are_named(case):
    change, error, message = BAD_MODULES[case]
    with pytest.raises(error, match=message):
        DenseCRF(**{"num_classes": 3, **change})


BAD_KERNELS = {
    "no bandwidth": ({"theta_position": None}, "kernel 'k' needs theta_position, theta_guide or both, got neither"),
    "theta_position": (
        {"theta_position": -2.0},
        "theta_position of kernel 'k' must be positive and finite in float32, got -2.0",
    ),
    "theta_guide": ({"theta_guide": (1.0, 0.0)}, r"theta_guide of kernel 'k' must be positive.*got \(1.0, 0.0\)"),
    "nan": ({"theta_guide": NAN}, "theta_guide of kernel 'k' must be positive and finite in float32, got nan"),
    "unused guide": ({"guide": "depth"}, "kernel 'k' .*theta_guide"),  # a guide without a bandwidth compares nothing
    "dotted": ({"name": "a.b"}, "name .*'a.b'"),
    "empty": ({"name": ""}, "name .*''"),
    "taken": ({"name": "keys"}, "name .*'keys'"),
}


@pytest.mark.parametrize("case", BAD_KERNELS)
def test_bad_kernels_are_named(case):
    change, message = BAD_KERNELS[case]
    with pytest.raises(ValueError, match=message):
        DenseCRF(2, kernels=[Kernel(**{"name": "k", "weight": 1.0, "theta_position": 2.0, **change})])


def test_bandwidths_as_many_as_channels():
    logits, image = draw()
    crf = DenseCRF(3, theta_beta=(3.0, 4.0, 5.0))
    for G in (1, 2):
        with pytest.raises(ValueError, match=rf"(theta_beta|theta_guide|image) .*3.* got .*{G}"):
            crf(logits, image[:, :G])
