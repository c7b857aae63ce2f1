"""The layer against mean field written out in float64, its gradients, and what must hold whatever the numbers."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from crfnet import DenseCRF, Kernel, dense_crf, logits_from_probabilities
from crfnet.ops import NORMALIZATIONS, GaussianFilter

# Bandwidths at which 20 random pixels do hear each other; at CRF-RNN's own the bilateral kernel is the identity.
WIDTHS = {"theta_alpha": 2.0, "theta_beta": 60.0, "theta_gamma": 1.5}
POTTS = {"weights": "scalar", "compatibility": "potts"}
ENGINES = ("exact", "lattice")


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(S=(4, 5), B=2, C=3, G=3, seed=0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(B, C, *S, generator=rng(seed), dtype=torch.float64)
    return logits.to(dtype), (255 * torch.rand(B, G, *S, generator=rng(seed + 1), dtype=torch.float64)).to(dtype)


def draw_mask(B=2, S=(4, 5), seed=0) -> Tensor:
    mask = torch.rand(B, *S, generator=rng(seed)) > 0.3
    mask[:, 0] = True
    return mask


def draw_weights(form: str, C=3, seed=0) -> float | Tensor:
    if form == "scalar":
        return 1.7
    return 0.5 + torch.rand(C, generator=rng(seed)) if form == "per_class" else torch.randn(C, C, generator=rng(seed))


def draw_compatibility(form: str, C=3, seed=5) -> str | Tensor:
    return "potts" if form == "potts" else draw_weights(form, C, seed)


def crf64(*args, **kwargs) -> DenseCRF:
    return DenseCRF(*args, **{**WIDTHS, "engine": "exact", "label_tolerance": 0.0, **kwargs}).double()


def log_q(logits: Tensor) -> Tensor:
    """What logits of the marginals mean; a constant added to all labels of a pixel means nothing."""
    return logits.log_softmax(1)


def agree(ours: Tensor, naive: Tensor, tolerance=1e-10) -> None:
    """Float64 sums of at most 64 terms, 10 iterations, logits near 10: rounding stays some orders under 1e-10."""
    torch.testing.assert_close(log_q(ours), log_q(naive), rtol=0, atol=tolerance)


def naive(crf: DenseCRF, logits, image, mask=None, guides=None, T=None) -> Tensor:
    """Mean field in the order of the papers, image by image, kernel by kernel, label by label."""
    T = (crf.num_iterations if crf.training else crf.num_iterations_eval) if T is None else T
    if crf.image_range is not None:
        black, white = crf.image_range
        image = (image.to(logits) - black) / (white - black) * 255
    everything = {"image": image, **(guides or {})}
    masks = torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask
    return torch.stack(
        [
            naive_image(crf, logits[b], {name: guide[b] for name, guide in everything.items()}, masks[b], T)
            for b in range(len(logits))
        ]
    )


def naive_image(crf: DenseCRF, logits, guides, mask, T) -> Tensor:
    C, *S = logits.shape
    inside = mask.flatten().nonzero()[:, 0]
    unary = -logits.flatten(1)[:, inside]  # (C, n)
    matrices = [kernel_matrix(crf, kernel, S, guides, inside) for kernel in crf.kernels.values()]
    # a pixel with no neighbour worth 1e-3 hears next to nothing, instead of rounding noise divided by itself
    sums = [K.sum(1).clamp(min=1e-3) if crf.remove_self else K.sum(1) for K in matrices]
    mu = naive_compatibility(crf)
    energy = -unary
    for _ in range(T):
        q = torch.exp(energy) / torch.exp(energy).sum(0)
        weighted = [torch.zeros_like(unary[0]) for _ in range(C)]
        for kernel, K, n in zip(crf.kernels.values(), matrices, sums, strict=True):
            if crf.normalization == "none":
                m = q @ K.T
            elif crf.normalization == "before":
                m = (q / n) @ K.T
            elif crf.normalization == "after":
                m = (q @ K.T) / n
            else:
                m = (q / n.sqrt()) @ K.T / n.sqrt()
            for a in range(C):
                if kernel.form == "full":
                    weighted[a] = weighted[a] + sum(kernel.weight[a, b] * m[b] for b in range(C))
                elif kernel.form == "per_class":
                    weighted[a] = weighted[a] + torch.exp(kernel.log_weight[a]) * m[a]
                else:
                    weighted[a] = weighted[a] + torch.exp(kernel.log_weight) * m[a]
        pairwise = torch.stack([sum(mu[a][b] * weighted[b] for b in range(C)) for a in range(C)])
        energy = (1 - crf.damping) * (-unary - pairwise) + crf.damping * energy
    return logits.flatten(1).index_copy(1, inside, energy).view(logits.shape)


def naive_compatibility(crf: DenseCRF) -> list[list]:
    C, form = crf.num_classes, crf.compatibility_form
    if form == "full":
        return [[crf.compatibility_matrix[a, b] for b in range(C)] for a in range(C)]
    strength = [1.0] * C if form == "potts" else [torch.exp(crf.log_compatibility[b]) for b in range(C)]
    return [[0.0 if a == b else strength[b] for b in range(C)] for a in range(C)]


def kernel_matrix(crf: DenseCRF, kernel, S, guides, inside) -> Tensor:  # (n, n)
    positions = torch.stack(torch.meshgrid(*[torch.arange(s) for s in S], indexing="ij")).flatten(1).double()
    features = []
    if kernel.theta_position is not None:
        features.append(positions[:, inside].T / kernel.theta_position)
    if kernel.guide is not None:
        features.append(guides[kernel.guide].double().flatten(1)[:, inside].T / kernel.theta_guide)
    f = torch.cat(features, 1)
    if kernel.guide is not None and crf.engine == "lattice":  # what the engine implements, column by column
        K = GaussianFilter(f[None], method="lattice")(torch.eye(len(f), dtype=f.dtype)[None])[0]
    else:
        K = torch.exp(-0.5 * (f[:, None] - f[None]).square().sum(2))
    return K - torch.diag(K.diagonal()) if crf.remove_self else K


# --- the numbers


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("compatibility", ["potts", "per_class", "full"])
@pytest.mark.parametrize("weights", ["scalar", "per_class", "full"])
def test_every_form_of_weights_and_compatibility(weights, compatibility, differentiable):
    crf = crf64(
        3,
        weights=weights,
        spatial_weight=draw_weights(weights, seed=1),
        bilateral_weight=draw_weights(weights, seed=2),
        compatibility=draw_compatibility(compatibility),
    )
    logits, image = draw()
    with torch.set_grad_enabled(differentiable):
        out = crf(logits, image)
    assert out.requires_grad == differentiable
    agree(out, naive(crf, logits, image))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("remove_self", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisations_masks_self_messages_and_damping(normalization, remove_self, masked, engine):
    mask = draw_mask() if masked else None
    logits, image = draw()
    for learn, damping in itertools.product([(), ("weights",)], [0.0, 0.4]):
        crf = crf64(
            3,
            **POTTS,
            normalization=normalization,
            remove_self=remove_self,
            damping=damping,
            engine=engine,
            learn=learn,
        )
        agree(crf(logits, image, mask), naive(crf, logits, image, mask))


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("S", [(9,), (4, 5), (2, 3, 4), (1, 1), (1, 6)])
def test_any_axes_and_channels(S, G):
    crf = crf64(2)
    logits, image = draw(S, C=2, G=G)
    agree(crf(logits, image), naive(crf, logits, image))


@pytest.mark.parametrize("learn", [(), ("weights", "compatibility", "bandwidths")])
def test_further_kernels_over_guides_of_their_own(learn):
    crf = crf64(
        3,
        theta_beta=(40.0, 60.0, 90.0),
        learn=learn,
        weights="per_class",
        compatibility="per_class",
        kernels=[
            Kernel("depth", 1.5, theta_guide=0.3, guide="depth"),
            Kernel("both", torch.tensor([0.5, 1.0, 2.0]), 1.2, (0.4, 0.8), guide="flow"),
            Kernel("wide", 0.7, theta_position=4.0),
            Kernel("colour", 0.9, theta_guide=100.0),
        ],
    )
    logits, image = draw()
    guides = {"depth": torch.rand(2, 1, 4, 5), "flow": torch.randn(2, 2, 4, 5, dtype=torch.float64)}
    agree(crf(logits, image, guides=guides), naive(crf, logits, image, guides=guides))
    mask = draw_mask()
    agree(crf(logits, image, mask, guides), naive(crf, logits, image, mask, guides))


@pytest.mark.parametrize("T", [0, 1, 5, 10])
def test_iterations_of_training_and_of_evaluation(T):
    logits, image = draw()
    crf = crf64(3, num_iterations=T, num_iterations_eval=T + 1)
    agree(crf(logits, image), naive(crf, logits, image, T=T))
    agree(crf.eval()(logits, image), naive(crf, logits, image, T=T + 1))
    assert (log_q(crf(logits, image)) - log_q(crf.train()(logits, image))).abs().max() > 1e-6


def test_the_defaults_are_those_of_crf_rnn():
    crf = DenseCRF(3)
    assert (crf.num_iterations, crf.num_iterations_eval, crf.normalization, crf.remove_self) == (5, 10, "after", False)
    spatial, bilateral = crf.kernels["spatial"], crf.kernels["bilateral"]
    assert torch.equal(spatial.weights(), 3 * torch.eye(3)) and torch.equal(bilateral.weights(), 5 * torch.eye(3))
    assert torch.equal(crf.compatibility, 1 - torch.eye(3))
    # a float32 logarithm near 5 is off by at most 2.4e-7, and so is what it is the logarithm of
    for got, wanted in ((spatial.theta_position, 3), (bilateral.theta_position, 160), (bilateral.theta_guide, 3)):
        assert float(got) == pytest.approx(wanted, rel=5e-7)


# A parameter's logarithm in float32 is off by up to 2.4e-7, and so is a parameter, relatively; a kernel entry then by
# 2 * 2.4e-7 * d²/2 exp(-d²/2) < 2e-7, a sum of 20 of them at weight 2.5 by 1e-5.
FLOAT32_PARAMETERS = 1e-5


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("compatibility", ["potts", draw_compatibility("full")])
def test_the_function_is_the_layer(normalization, compatibility):
    logits, image = draw()
    mask = draw_mask()
    crf = crf64(3, weights="scalar", spatial_weight=1.5, bilateral_weight=2.5, compatibility=compatibility)
    crf.normalization = normalization
    out = dense_crf(
        image,
        logits,
        **WIDTHS,
        spatial_weight=1.5,
        bilateral_weight=2.5,
        num_iterations=7,
        normalization=normalization,
        mask=mask,
        engine="exact",
        compatibility=compatibility,
        label_tolerance=0.0,
    )
    assert out.dtype == torch.float64 and not out.requires_grad
    agree(out, naive(crf, logits, image, mask, T=7), FLOAT32_PARAMETERS)


def test_the_function_differentiates_to_its_inputs_and_defaults_to_deeplab():
    logits, image = (x.requires_grad_() for x in draw())
    out = dense_crf(image, logits, theta_beta=60.0)
    agree(out, naive(DenseCRF(3, **POTTS, theta_beta=60.0).double(), logits, image, T=10), FLOAT32_PARAMETERS)
    (log_q(out)[:, 0].sum()).backward()
    assert logits.grad.any() and image.grad.any()


def test_tiles_that_the_exact_engine_skips_cost_what_it_promises():
    """One iteration: at most 1e-3 of a row's mass is missing above and below the line, at weight 5: 2 * 1e-3 * 5."""
    crf = DenseCRF(3, **POTTS, theta_beta=13.0, theta_alpha=4.0, engine="exact", num_iterations=1)
    logits, image = draw((24, 25), dtype=torch.float32)
    error = log_q(crf(logits, image)) - log_q(naive(crf, logits.double(), image.double()))
    assert error.abs().max() < 2 * 2e-3 * 5  # and log softmax at most doubles the largest change


# --- gradients


def parameters_of(crf: DenseCRF) -> tuple[list[str], list[Tensor]]:
    names, tensors = zip(*crf.named_parameters(), strict=True)
    return list(names), [t.detach().clone().requires_grad_() for t in tensors]


def as_function(crf: DenseCRF, names: list[str], mask=None):
    def call(logits, image, *values):
        return torch.func.functional_call(crf, dict(zip(names, values, strict=True)), (logits, image, mask))

    return call


EVERYTHING = ("weights", "compatibility", "bandwidths")


@pytest.mark.parametrize("form", ["per_class", "full"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck_to_everything(normalization, form):
    crf = crf64(2, learn=EVERYTHING, weights=form, compatibility=form, normalization=normalization, num_iterations=2)
    names, values = parameters_of(crf)
    assert len(names) == 2 + 1 + 3
    logits, image = (x.requires_grad_() for x in draw((2, 3), B=1, C=2, G=2))
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    assert gradcheck(as_function(crf, names, mask), (logits, image, *values))


@pytest.mark.parametrize("remove_self", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("weights", ["scalar", "full"])
def test_gradients_are_autograds_through_the_definition(weights, checkpoint, remove_self):
    crf = crf64(3, learn=EVERYTHING, weights=weights, remove_self=remove_self, damping=0.2, checkpoint=checkpoint)
    logits, image = (x.requires_grad_() for x in draw())
    mask = draw_mask()
    target = torch.randn(logits.shape, generator=rng(9), dtype=torch.float64)
    sources = [logits, image, *crf.parameters()]
    ours = torch.autograd.grad((log_q(crf(logits, image, mask)) * target).sum(), sources)
    truth = torch.autograd.grad((log_q(naive(crf, logits, image, mask)) * target).sum(), sources)
    for got, wanted in zip(ours, truth, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_lattice_has_the_slope_of_what_it_computes(normalization):
    crf = crf64(2, engine="lattice", normalization=normalization, num_iterations=2, theta_gamma=1.0)
    names, values = parameters_of(crf)
    logits, image = draw((2, 4), B=1, C=2)
    assert gradcheck(lambda x, *v: as_function(crf, names)(x, image, *v), (logits.requires_grad_(), *values))


@pytest.mark.parametrize("engine", ENGINES)
def test_recomputing_changes_nothing_but_the_memory(engine):
    logits, image = draw((8, 9), C=4, dtype=torch.float32)
    logits.requires_grad_()
    stored, results = {}, {}
    for checkpoint in (False, True):
        crf = DenseCRF(4, **WIDTHS, engine=engine, learn=EVERYTHING, checkpoint=checkpoint, num_iterations=6)
        storages: dict[int, Tensor] = {}  # kept alive, so that no address is used twice

        def keep(tensor: Tensor, storages=storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = crf(logits, image)
        stored[checkpoint] = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        results[checkpoint] = [out, *torch.autograd.grad(out.square().sum(), [logits, *crf.parameters()])]
    for got, wanted in zip(results[True], results[False], strict=True):
        assert torch.equal(got, wanted)
    one = logits.numel() * logits.element_size()
    assert stored[False] > 6 * 3 * one  # the marginals and two messages an iteration
    assert stored[True] < 6 * one + 4 * one  # the logits of an iteration, and what building the filters keeps


def test_every_parameter_of_every_combination_hears_of_the_loss():
    logits, image = draw()
    forms = itertools.product(["scalar", "per_class", "full"], ["potts", "per_class", "full"])
    for weights, compatibility in forms:
        crf = crf64(3, weights=weights, compatibility=compatibility, learn=EVERYTHING)
        crf(logits, image).softmax(1)[:, 0].square().sum().backward()
        for name, parameter in crf.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (weights, compatibility, name)


def test_weights_that_start_at_zero_can_leave_it():
    crf = crf64(3, spatial_weight=0.0, bilateral_weight=0.0)
    logits, image = draw()
    agree(crf(logits, image), logits)
    crf(logits, image).softmax(1)[:, 0].square().sum().backward()
    assert crf.kernels["spatial"].weight.grad.any() and crf.kernels["bilateral"].weight.grad.any()


def test_no_gradient_is_asked_for_that_nobody_wants():
    logits, image = draw()
    assert not crf64(3, learn=())(logits, image).requires_grad
    assert not crf64(3).requires_grad_(False)(logits, image).requires_grad
    assert crf64(3, learn=())(logits, image.requires_grad_()).requires_grad
    assert not crf64(3)(logits, image).isnan().any() and logits.grad is None and image.grad is None


# --- properties

problems = {"seed": st.integers(0, 2**31), "C": st.integers(1, 5), "H": st.integers(1, 6), "W": st.integers(1, 6)}
few = settings(max_examples=15)


@few
@given(**problems, normalization=st.sampled_from(NORMALIZATIONS), engine=st.sampled_from(ENGINES))
def test_marginals_are_probabilities_and_constants_mean_nothing(seed, C, H, W, normalization, engine):
    logits, image = draw((H, W), C=C, seed=seed)
    crf = crf64(C, engine=engine, normalization=normalization)
    out = crf(logits, image)
    assert out.shape == logits.shape and out.isfinite().all()
    total = out.softmax(1).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))
    shifted = crf(logits + torch.randn(2, 1, H, W, generator=rng(seed), dtype=torch.float64), image)
    agree(shifted, out)


@few
@given(**problems, form=st.sampled_from(["scalar", "per_class", "full"]))
def test_relabelling_commutes(seed, C, H, W, form):
    logits, image = draw((H, W), C=C, seed=seed)
    order = torch.randperm(C, generator=rng(seed))

    def crf(relabel):
        def moved(x):
            return x if not isinstance(x, Tensor) else relabel(x)

        weight, compatibility = moved(draw_weights(form, C, seed)), moved(draw_compatibility("full", C, seed + 1))
        return crf64(C, weights=form, spatial_weight=weight, compatibility=compatibility)

    out = crf(lambda x: x)(logits, image)
    other = crf(lambda x: x[order] if x.ndim == 1 else x[order][:, order])(logits[:, order], image)
    agree(other, out[:, order])


@few
@given(**problems, axis=st.sampled_from([2, 3]), gradients=st.booleans())
def test_flipping_the_image_commutes(seed, C, H, W, axis, gradients):
    logits, image = draw((H, W), C=C, seed=seed)
    crf = crf64(C, learn=("weights",) if gradients else ())
    agree(crf(logits.flip(axis), image.flip(axis)), crf(logits, image).flip(axis))
    agree(crf(logits.mT, image.mT), crf(logits, image).mT)


@few
@given(seed=st.integers(0, 2**31), engine=st.sampled_from(ENGINES))
def test_permuting_pixels_commutes_where_position_plays_no_part(seed, engine):
    """The lattice too: which vertices exist does not depend on the order of the points."""
    logits, image = draw((17,), seed=seed)
    colour = Kernel("colour", 4.0, theta_guide=60.0)
    crf = crf64(3, spatial_weight=0.0, bilateral_weight=0.0, kernels=[colour], engine=engine, **POTTS, learn=())
    order = torch.randperm(17, generator=rng(seed))
    agree(crf(logits[..., order], image[..., order]), crf(logits, image)[..., order])


@pytest.mark.parametrize("gradients", [False, True])
def test_zero_weights_return_the_input(gradients):
    logits, image = draw()
    crf = crf64(3, **POTTS, spatial_weight=0.0, bilateral_weight=0.0, learn=())
    out = crf(logits.requires_grad_(gradients), image)
    torch.testing.assert_close(out, logits, rtol=0, atol=1e-12)


def test_potts_is_minus_the_identity_up_to_a_constant():
    """Caffe's CRF-RNN stores -I where the paper has 1 - I."""
    logits, image = draw()
    agree(crf64(3)(logits, image), crf64(3, compatibility=-torch.eye(3))(logits, image))
    agree(crf64(3)(logits, image), crf64(3, weights="scalar", compatibility="potts")(logits, image), 1e-6)  # exp(log 3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_batch_is_its_images_one_by_one(engine, gradients):
    logits, image = draw(B=3)
    mask = draw_mask(B=3)
    crf = crf64(3, engine=engine, learn=("weights",) if gradients else ())
    together = crf(logits, image, mask)
    for b in range(3):
        agree(crf(logits[b, None], image[b, None], mask[b, None]), together[b, None])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("normalization", ["after", "symmetric"])
def test_padding_with_a_mask_is_the_crop(engine, gradients, normalization):
    logits, image = draw()
    crf = crf64(3, engine=engine, normalization=normalization, learn=("weights",) if gradients else ())
    left, top = (0, 0) if engine == "lattice" else (1, 2)  # its vertices do not move with the pixels
    pad = (left, 4 - left, top, 3 - top)
    padded, mask = torch.nn.functional.pad(logits, pad, value=7.0), torch.zeros(2, 7, 9, dtype=torch.bool)
    crop = (slice(None), slice(top, top + 4), slice(left, left + 5))
    mask[crop] = True
    image_padded = torch.nn.functional.pad(image, pad, value=float("nan"))
    out = crf(padded, image_padded, mask)
    agree(out.movedim(1, -1)[crop].movedim(-1, 1), crf(logits, image))
    assert torch.equal(out.masked_select(~mask[:, None]), padded.masked_select(~mask[:, None]))


def test_masked_pixels_may_hold_anything_and_pass_no_gradient():
    logits, image = draw()
    mask = draw_mask()
    crf = crf64(3, learn=EVERYTHING)
    clean = crf(logits, image, mask)
    hole = ~mask[:, None]
    dirty = [x.masked_fill(hole, float("nan")).requires_grad_() for x in (logits, image)]
    out = crf(*dirty, mask)
    assert out.masked_select(hole).isnan().all()
    inside = mask[:, None].expand_as(out)
    assert torch.equal(out[inside], clean[inside])
    out[inside].square().sum().backward()
    for x in dirty:
        assert x.grad.isfinite().all() and not x.grad.masked_select(hole).any()
    assert all(p.grad.isfinite().all() for p in crf.parameters())
    full = torch.ones_like(mask)
    agree(crf(logits, image, full), crf(logits, image))


@few
@given(**problems, form=st.sampled_from(["scalar", "per_class", "full"]), damping=st.sampled_from([0.0, 0.5]))
def test_without_gradients_the_same_marginals(seed, C, H, W, form, damping):
    logits, image = draw((H, W), C=C, seed=seed)
    crf = crf64(C, weights=form, compatibility=form if form != "scalar" else "potts", damping=damping).eval()
    with torch.no_grad():
        out = crf(logits, image)
    agree(out, crf(logits, image))
    with torch.inference_mode():
        assert torch.equal(crf(logits, image), out)


# --- numerical safety


def worst_logits(kind: str) -> Tensor:
    one_hot = torch.nn.functional.one_hot(torch.randint(0, 3, (1, 4, 5), generator=rng(0)), 3).movedim(3, 1).float()
    if kind == "one-hot":
        return logits_from_probabilities(one_hot)
    if kind == "tiny eps":
        return logits_from_probabilities(one_hot, eps=1e-38)
    if kind == "1e4":
        return 1e4 * (2 * one_hot - 1)
    return torch.full((1, 3, 4, 5), 1e4 if kind == "all 1e4" else -1e4)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("weight", [0.0, 5.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["one-hot", "tiny eps", "1e4", "all 1e4", "all -1e4"])
def test_extreme_unaries_and_weights_stay_finite(kind, weight, gradients):
    _, image = draw(B=1, dtype=torch.float32)
    logits = worst_logits(kind).requires_grad_(gradients)
    crf = DenseCRF(3, spatial_weight=weight, bilateral_weight=weight, learn=EVERYTHING if gradients else ())
    out = crf(logits, image)
    assert out.isfinite().all()
    if kind == "1e4" and weight <= 1e3:  # no message overrules 2e4 to nothing
        assert torch.equal(out.argmax(1), logits.argmax(1))
    if gradients:
        grads = torch.autograd.grad(out.softmax(1)[:, 0].sum(), [logits, *crf.parameters()])
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("gradients", [False, True])
def test_one_class_and_one_pixel(gradients):
    for S, C in [((1, 1), 1), ((1, 1), 3), ((1,), 2), ((3, 4), 1)]:
        logits, image = draw(S, B=1, C=C)
        crf = crf64(C, learn=EVERYTHING if gradients else ())
        agree(crf(logits, image), naive(crf, logits, image))
        alone = crf64(C, remove_self=True)(logits, image)
        assert alone.isfinite().all()
        if math.prod(S) == 1:  # without a neighbour and without itself a pixel hears nothing
            agree(alone, logits)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_rounded_once(dtype, gradients):
    logits, image = draw(dtype=torch.float32)
    logits = logits.to(dtype).requires_grad_(gradients)
    crf = DenseCRF(3, **WIDTHS, learn=())
    out = crf(logits, image.to(dtype))
    assert out.dtype == dtype
    truth = log_q(crf(logits.detach().float(), image.to(dtype).float()))
    # logits near 20, rounded to eps, and the same for the largest one in log softmax
    assert (log_q(out.float()) - truth).abs().max() <= 2 * 32 * torch.finfo(dtype).eps / 2
    if gradients:
        out.float().softmax(1)[:, 0].sum().backward()
        assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_half_logits_survive_unnormalised_messages(dtype, gradients):
    """900 equal pixels at weight 100 add 9e4 to a logit, more than float16 can say; only differences matter."""
    logits = torch.randn(1, 2, 30, 30, generator=rng(0)).to(dtype).requires_grad_(gradients)
    crf = DenseCRF(2, **POTTS, bilateral_weight=100.0, normalization="none", learn=())
    out = crf(logits, torch.zeros(1, 3, 30, 30))
    assert not out.softmax(1).isnan().any()


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("form", ["potts", "full"])
def test_autocast_changes_nothing(form, checkpoint):
    """Backward is called outside of autocast, as torch's documentation wants."""
    logits, image = draw(dtype=torch.float32)
    weights = "full" if form == "full" else "scalar"
    crf = DenseCRF(3, **WIDTHS, weights=weights, compatibility=form, learn=EVERYTHING, checkpoint=checkpoint)

    def call(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = crf(logits, image)
            with torch.no_grad():
                fast = crf(logits, image)
        return [out, fast, *torch.autograd.grad(out.square().sum(), list(crf.parameters()))]

    same(call(True), call(False))


def test_autocast_changes_no_diagnosis():
    logits, image = draw(dtype=torch.float32)
    crf = DenseCRF(3, **WIDTHS)

    def call(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return [crf.energy(logits.argmax(1), logits, image), *crf.diagnose(logits, image)]

    same(call(True), call(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_logits_is_that_of_the_result(dtype):
    crf = DenseCRF(3, **WIDTHS, engine="exact")  # float32 parameters
    for image_dtype in (torch.uint8, torch.int64, torch.float32, torch.float64):
        logits, image = draw(dtype=dtype)
        image = image.round().to(image_dtype)
        assert crf(logits, image).dtype == dtype
        with torch.no_grad():
            out = crf(logits, image)
        assert out.dtype == dtype
        # float32 rounds logits near 20 to 1e-6, ten times over; float64 logits are filtered in float64
        rounding = 1e-4 if dtype == torch.float32 else 1e-10
        agree(out.double(), naive(crf, logits.double(), image.double()), rounding)


@pytest.mark.parametrize("compatibility", ["potts", "per_class", "full"])
def test_images_are_worked_through_in_pieces(monkeypatch, compatibility):
    """Pieces of one row each, of two and the rest, or of all: the same numbers to rounding."""
    logits, image = draw((7, 5))
    mask = draw_mask(S=(7, 5))
    for kwargs in ({"weights": "per_class"}, {"weights": "full"}):
        crf = crf64(3, compatibility=compatibility, **kwargs).eval()
        for m in (None, mask):
            expected = naive(crf, logits, image, m)
            for piece in (1, 2 * 3 * 5, 10**6):
                monkeypatch.setattr("crfnet.inference.PIECE", piece)
                with torch.no_grad():
                    agree(crf(logits, image, m), expected)


@few
@given(seed=st.integers(0, 2**31), C=st.integers(2, 24), scale=st.sampled_from([0.5, 2.0, 5.0]), flat=st.booleans())
def test_labels_taken_as_one_change_no_marginal_by_more_than_the_tolerance(seed, C, scale, flat):
    logits, image = draw((8, 8), C=C, seed=seed)
    logits[:, 2:] -= 4.0  # most labels are quiet
    image = torch.zeros_like(image) if flat else image
    for tolerance in (1e-3, 1e-2, 0.3):
        crf = crf64(C, weights="per_class", compatibility="per_class", learn=(), label_tolerance=tolerance)
        truth = crf64(C, weights="per_class", compatibility="per_class", learn=())
        error = crf(scale * logits, image).softmax(1) - truth(scale * logits, image).softmax(1)
        assert error.abs().max() <= tolerance


def test_labels_taken_as_one_are_parted_before_they_grow_together():
    """At strength 40 a label of 0.8 % stays there, since q exp(-40 q) never passes 0.0092; one of 1.6 % takes over."""
    p = torch.tensor([0.492, 0.492, 0.008, 0.008], dtype=torch.float64)
    logits, image = p.log().view(1, 4, 1, 1).expand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8)
    forms = {"weights": "scalar", "spatial_weight": 4.0, "bilateral_weight": 4.0, "learn": ()}
    forms["compatibility"] = torch.tensor([0.01, 0.01, 5.0, 5.0])
    crf, truth = (crf64(4, **forms, label_tolerance=t, num_iterations=30) for t in (0.3, 0.0))
    agree(truth(logits, image), naive(truth, logits, image))
    assert truth(logits, image).softmax(1)[:, 2:].max() < 0.1
    assert (crf(logits, image).softmax(1) - truth(logits, image).softmax(1)).abs().max() <= 0.3


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("C", [1, 3])
def test_inputs_are_left_alone_whatever_their_strides(C, gradients):
    logits, image = draw(C=C)
    expected = crf64(C)(logits, image)
    strided = [
        logits.to(memory_format=torch.channels_last),
        logits.mT.contiguous().mT,
        torch.stack([logits, logits], -1)[..., 1],
    ]
    for x in strided:
        kept, kept_image = x.clone(), image.clone()
        for T in (0, 3):
            crf = crf64(C, learn=("weights",) if gradients else (), num_iterations=T, num_iterations_eval=5).eval()
            agree(crf(x, image), expected)
            out = crf.train()(x, image).detach()
            out.add_(1.0)  # the result is the caller's own
            assert torch.equal(x, kept) and torch.equal(image, kept_image)


def test_nothing_inside_warns():
    """torch warns once a process of some things; here it is made to warn always, and warnings are errors."""
    logits, image = (x.requires_grad_() for x in draw(dtype=torch.float32))
    torch.set_warn_always(True)
    try:
        for engine, normalization in itertools.product(ENGINES, NORMALIZATIONS):
            for kwargs in ({"learn": EVERYTHING, "checkpoint": True}, {"learn": (), **POTTS}):
                crf = DenseCRF(3, engine=engine, normalization=normalization, remove_self=True, **kwargs)
                crf(logits, image, draw_mask()).sum().backward()
                crf.diagnose(logits, image)
                crf.energy(logits.argmax(1), logits, image).sum().backward()
                with torch.no_grad():
                    crf.eval()(logits, image)
        logits_from_probabilities(logits.softmax(1)).sum().backward()
    finally:
        torch.set_warn_always(False)


def test_no_random_numbers_and_no_state():
    logits, image = draw(dtype=torch.float32)
    crf = DenseCRF(3, **WIDTHS, checkpoint=True)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in crf.state_dict().items()}
    first = crf(logits, image)
    first.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(crf(logits, image), first)
    assert all(torch.equal(v, before[k]) for k, v in crf.state_dict().items())


# --- diagnostics


def test_energy_is_that_of_every_labelling_counted_pair_by_pair():
    C, S, N = 3, (2, 2), 4
    logits, image = draw(S, B=1, C=C)
    labelings = torch.tensor(list(itertools.product(range(C), repeat=N))).view(-1, *S)
    B = len(labelings)
    for weights, compatibility, remove_self in itertools.product(
        ["scalar", "per_class", "full"], ["potts", "per_class", "full"], [False, True]
    ):
        crf = crf64(
            C,
            weights=weights,
            spatial_weight=draw_weights(weights, seed=1),
            bilateral_weight=draw_weights(weights, seed=2),
            compatibility=draw_compatibility(compatibility),
            normalization="none",
            remove_self=remove_self,
        )
        got = crf.energy(labelings, logits.expand(B, -1, -1, -1), image.expand(B, -1, -1, -1))
        x = labelings.flatten(1)
        expected = -torch.stack([logits[0].flatten(1)[x[:, i], i] for i in range(N)]).sum(0)
        mu = crf.compatibility.detach()
        for kernel in crf.kernels.values():
            K = kernel_matrix(crf, kernel, S, {"image": image[0]}, torch.arange(N))
            W = kernel.weights()
            cost = (mu @ (W if W.ndim == 2 else torch.diag(W.expand(C)))).detach()
            cost = (cost + cost.T) / 2  # an asymmetric cost is that of the pair in both orders, halved
            for i, j in itertools.combinations(range(N), 2):
                expected = expected + cost[x[:, i], x[:, j]] * K[i, j]
            if not remove_self:  # as in inference, half a pair with itself
                expected = expected + 0.5 * cost[x, x].sum(1)
        torch.testing.assert_close(
            got, expected, rtol=1e-12, atol=1e-10, msg=f"{weights} {compatibility} {remove_self}"
        )


def test_energy_of_a_masked_image_is_that_of_its_crop():
    logits, image = draw()
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[:, 1:3, 1:] = True
    labels = logits.argmax(1)
    crop = (slice(None), slice(1, 3), slice(1, None))
    crf = crf64(3)
    alone = crf.energy(labels[crop], logits[:, :, 1:3, 1:], image[:, :, 1:3, 1:])
    whole = crf.energy(labels.masked_fill(~mask, 255), logits.masked_fill(~mask[:, None], float("nan")), image, mask)
    torch.testing.assert_close(whole, alone)


def test_marginals_are_exact_to_first_order_in_the_coupling():
    """Mean field drops correlations, which are of second order: halving the weights quarters the error."""
    S, C = (2, 3), 2
    logits, image = draw(S, B=1, C=C)
    labelings = torch.tensor(list(itertools.product(range(C), repeat=6))).view(-1, *S)

    def error(weight: float) -> float:
        forms = {**POTTS, "learn": (), "normalization": "none", "remove_self": True}
        crf = crf64(C, **forms, spatial_weight=weight, bilateral_weight=weight)
        B = len(labelings)
        energy = crf.energy(labelings, logits.expand(B, -1, -1, -1), image.expand(B, -1, -1, -1))
        p = (-energy).softmax(0)
        exact = torch.stack([((labelings == a) * p[:, None, None]).sum(0) for a in range(C)])
        return float((crf.eval()(logits, image).softmax(1)[0] - exact).abs().max())

    assert error(0.02) < 1e-3
    assert 3.5 < error(0.02) / error(0.01) < 4.5


@few
@given(seed=st.integers(0, 2**31), C=st.integers(2, 5), normalization=st.sampled_from(["symmetric", "none"]))
def test_free_energy_never_rises(seed, C, normalization):
    """Kernel positive definite, Potts negative: the parallel update is a concave-convex step (ICML 2013)."""
    logits, image = draw(seed=seed, C=C)
    crf = crf64(C, **POTTS, normalization=normalization)
    F = crf.diagnose(logits, image, draw_mask(seed=seed), num_iterations=12).free_energy
    assert F.dtype == torch.float64
    assert (F.diff(dim=0) <= 1e-12 * F.abs().max()).all()
    assert F[0].gt(F[-1]).all()


def test_free_energy_is_an_upper_bound_that_one_labelling_reaches():
    """F(q) = E_q[E] - H(q) >= -log Z, and for a certain q it is that labelling's energy."""
    S = (2, 3)
    logits, image = draw(S, B=1)
    labelings = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, *S)
    B = len(labelings)
    crf = crf64(3, **POTTS, normalization="none", remove_self=True)
    energy = crf.energy(labelings, logits.expand(B, -1, -1, -1), image.expand(B, -1, -1, -1))
    assert (crf.diagnose(logits, image).free_energy >= -(-energy).logsumexp(0)).all()
    labels = labelings[[100]]
    # the unaries rule out all else: q is one-hot, its entropy 0
    certain = torch.where(torch.nn.functional.one_hot(labels, 3).movedim(3, 1).bool(), 0.0, -1e3).double()
    F = crf.diagnose(certain, image, num_iterations=0).free_energy[0]
    torch.testing.assert_close(F, crf.energy(labels, certain, image).detach())


def test_diagnostics_follow_inference():
    logits, image = draw((1, 2), B=16)  # two pixels, so that the largest change is a loss in some images
    crf = crf64(3, damping=0.2, compatibility=draw_compatibility("full"))
    free_energy, change = crf.diagnose(logits, image, num_iterations=4)
    assert free_energy.shape == (5, 16) and change.shape == (4, 16)
    marginals = [naive(crf, logits, image, T=t).softmax(1) for t in range(5)]
    for t in range(4):
        expected = (marginals[t + 1] - marginals[t]).abs().flatten(1).amax(1)
        torch.testing.assert_close(change[t], expected.detach(), rtol=0, atol=1e-10)
    assert not free_energy.requires_grad
    none = crf.diagnose(logits, image, num_iterations=0)
    assert none.free_energy.shape == (1, 16) and none.change.shape == (0, 16)
    assert len(crf.diagnose(logits, image).change) == crf.num_iterations_eval


def test_inference_converges():
    logits, image = draw()
    change = crf64(3, **POTTS, normalization="symmetric").diagnose(logits, image, num_iterations=60).change
    assert (change[-1] < 1e-6).all() and (change[0] > 1e-3).all()


# --- what an image may be


def test_image_ranges_are_one_scale():
    logits, image = draw()
    image = image.round()
    expected = crf64(3)(logits, image)
    for given_image, image_range in [
        (image.to(torch.uint8), (0.0, 255.0)),
        (image.to(torch.int32), (0, 255)),
        (image / 255, (0.0, 1.0)),
        (image / 127.5 - 1, (-1.0, 1.0)),
        (image, None),
    ]:
        agree(crf64(3, image_range=image_range)(logits, given_image), expected, 1e-9)


def test_any_guide_goes_without_a_range():
    logits, image = draw()
    agree(crf64(3, image_range=None)(logits, image - 1e3), crf64(3)(logits, image), 1e-8)


@pytest.mark.parametrize(
    ("image_range", "move", "message"),
    [
        ((0.0, 255.0), lambda x: x - 128, r"image must lie in image_range 0..255, got -\d+.*mean subtracted"),
        ((0.0, 255.0), lambda x: x + 10, r"image must lie in image_range 0..255, got .* to 26\d"),
        ((0.0, 1.0), lambda x: x, r"image must lie in image_range 0..1, got .* to 25\d"),
        ((0.0, 1.0), lambda x: x.to(torch.uint8), r"image must lie in image_range 0..1, got"),
        ((-1.0, 1.0), lambda x: x / 64 - 2, r"image must lie in image_range -1..1, got -1.9"),
    ],
)
def test_images_out_of_range_are_refused(image_range, move, message):
    logits, image = draw()
    with pytest.raises(ValueError, match=message):
        DenseCRF(3, image_range=image_range)(logits, move(image))


def test_an_image_in_0_to_1_under_0_to_255_is_asked_about():
    logits, image = draw()
    crf = DenseCRF(3)
    for call in (
        lambda: crf(logits, image / 255),
        lambda: dense_crf(image / 255, logits),
        lambda: crf.diagnose(logits, image / 255),
    ):
        with pytest.warns(UserWarning, match=r"image spans .* of image_range 0..255.*image_range=\(0, 1\)"):
            call()


def test_the_warning_points_at_the_line_that_called():
    logits, image = draw()
    crf = DenseCRF(3)
    with pytest.warns(UserWarning) as record:
        crf(logits, image / 255)
        dense_crf(image / 255, logits)
        crf.diagnose(logits, image / 255)
        crf.energy(logits.argmax(1), logits, image / 255)
    assert [warning.filename for warning in record] == 4 * [__file__]


def test_images_that_are_right_pass_in_silence():
    logits, image = draw()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DenseCRF(3)(logits, torch.zeros_like(image))
        DenseCRF(3)(logits, (image / 255).round().to(torch.uint8))  # integers 0 and 1 are dark, not scaled
        DenseCRF(3)(logits, image.clamp(0, 255) * 1.0005)  # resampling overshoots


# --- bad input

LOGITS, IMAGE = draw(dtype=torch.float32)
NAN, INF = float("nan"), float("inf")
BAD_CALLS = {
    "logits rank": (
        {"logits": LOGITS[0]},
        ValueError,
        r"logits must be \(B, 3, H, W\).*got \(3, 4, 5\).*logits\[None\]",
    ),
    "logits axes": ({"logits": LOGITS[..., None, None]}, ValueError, r"logits must be .*got \(2, 3, 4, 5, 1, 1\)"),
    "logits classes": ({"logits": LOGITS[:, :2]}, ValueError, r"logits must be \(B, 3,.*got \(2, 2, 4, 5\)"),
    "logits no images": ({"logits": LOGITS[:0]}, ValueError, r"logits .*none of them 0.*got \(0, 3, 4, 5\)"),
    "logits no pixels": ({"logits": LOGITS[..., :0]}, ValueError, r"logits .*got \(2, 3, 4, 0\)"),
    "logits integers": ({"logits": LOGITS.long()}, TypeError, "logits must be a floating-point tensor, got .*int64"),
    "logits complex": (
        {"logits": LOGITS.cfloat()},
        TypeError,
        "logits must be a floating-point tensor, got .*complex64",
    ),
    "logits array": ({"logits": LOGITS.numpy()}, TypeError, "logits must be a floating-point tensor, got a ndarray"),
    "logits none": ({"logits": None}, TypeError, "logits must be a floating-point tensor, got a NoneType"),
    "logits nan": (
        {"logits": LOGITS.clone().fill_(NAN)},
        ValueError,
        "logits must be finite, got NaN.*from_probabilities",
    ),
    "logits inf": ({"logits": LOGITS.clone().fill_(INF)}, ValueError, "logits must be finite, got .*infinity"),
    "logits -inf": ({"logits": LOGITS.clone().fill_(-INF)}, ValueError, "logits must be finite, got .*infinity"),
    "logits device": ({"logits": LOGITS.to("meta")}, ValueError, "(logits|image) must be on .*(meta|cpu)"),
    "image size": (
        {"image": IMAGE[..., :4]},
        ValueError,
        r"image must be \(2, G, 4, 5\) for logits .*got \(2, 3, 4, 4\)",
    ),
    "image batch": ({"image": IMAGE[:1]}, ValueError, r"image must be \(2, G, 4, 5\).*got \(1, 3, 4, 5\)"),
    "image rank": ({"image": IMAGE[0]}, ValueError, r"image must be .*got \(3, 4, 5\)"),
    "image channels last": ({"image": IMAGE.permute(0, 2, 3, 1)}, ValueError, r"image must be .*got \(2, 4, 5, 3\)"),
    "image no channels": ({"image": IMAGE[:, :0]}, ValueError, r"image must be .*got \(2, 0, 4, 5\)"),
    "image array": ({"image": IMAGE.numpy()}, TypeError, "image must be a tensor of numbers, got a ndarray"),
    "image none": ({"image": None}, TypeError, "image must be a tensor of numbers, got a NoneType"),
    "image bool": ({"image": IMAGE > 99}, TypeError, "image must be a tensor of numbers, got .*bool"),
    "image nan": ({"image": IMAGE.clone().fill_(NAN)}, ValueError, "image must be finite, got NaN.*mask"),
    "image inf": ({"image": IMAGE.clone().fill_(INF)}, ValueError, "image must be finite, got .*infinity"),
    "image device": ({"image": IMAGE.to("meta")}, ValueError, "image must be on cpu like the logits, got meta"),
    "mask dtype": ({"mask": torch.ones(2, 4, 5)}, TypeError, "mask must be a bool tensor.*got .*float32"),
    "mask array": ({"mask": draw_mask().numpy()}, TypeError, "mask must be a bool tensor.*got a ndarray"),
    "mask shape": ({"mask": draw_mask()[:, None]}, ValueError, r"mask must be \(2, 4, 5\).*got \(2, 1, 4, 5\)"),
    "mask device": ({"mask": draw_mask().to("meta")}, ValueError, "mask must be .* on cpu .*on meta"),
    "mask empty": ({"mask": draw_mask() & torch.tensor([1, 0]).bool()[:, None, None]}, ValueError, "none in image 1"),
    "guide missing": ({"guides": {}}, ValueError, r"guides must have 'depth' for kernel 'k', got \['image'\]"),
    "guide size": (
        {"guides": {"depth": IMAGE[..., :4]}},
        ValueError,
        r"depth must be \(2, G, 4, 5\).*got \(2, 3, 4, 4\)",
    ),
    "guide nan": ({"guides": {"depth": IMAGE * NAN}}, ValueError, "depth must be finite, got NaN"),
    "guide array": (
        {"guides": {"depth": IMAGE.numpy()}},
        TypeError,
        "depth must be a tensor of numbers, got a ndarray",
    ),
    "guide channels": ({"guides": {"depth": IMAGE}}, ValueError, r"depth .*2 channels.*got .*3"),
    "guide one channel": ({"guides": {"depth": IMAGE[:, :1]}}, ValueError, r"depth .*2 channels.*got .*1"),
    "guide unused": ({"guides": {"depth": IMAGE[:, :2], "heat": IMAGE}}, ValueError, r"guides .*\['heat'\]"),
    "guide twice": ({"guides": {"depth": IMAGE[:, :2], "image": IMAGE}}, ValueError, "guides .*image"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_named(case):
    change, error, message = BAD_CALLS[case]
    crf = DenseCRF(3, kernels=[Kernel("k", 1.0, theta_guide=(1.0, 2.0), guide="depth")])
    arguments = {"logits": LOGITS, "image": IMAGE, "mask": None, "guides": {"depth": IMAGE[:, :2]}, **change}
    with pytest.raises(error, match=message):
        crf(**arguments)


BAD_LABELS = {
    "shape": (torch.zeros(2, 5, 4).long(), ValueError, r"labels must be integers \(2, 4, 5\), got \(2, 5, 4\)"),
    "dtype": (torch.zeros(2, 4, 5), (TypeError, ValueError), r"labels must be integers .*float32"),
    "above": (torch.full((2, 4, 5), 3), ValueError, r"labels must lie in 0..2, got 3..3"),
    "below": (torch.full((2, 4, 5), -1), ValueError, r"labels must lie in 0..2, got -1..-1"),
    "array": (torch.zeros(2, 4, 5).long().numpy(), (TypeError, ValueError), "labels must be .*ndarray"),
    "list": ([[0]], (TypeError, ValueError), "labels must be .*list"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_named(case):
    labels, error, message = BAD_LABELS[case]
    with pytest.raises(error, match=message):
        DenseCRF(3).energy(labels, LOGITS, IMAGE)


BAD_FUNCTION = {
    "logits rank": ({"logits": LOGITS[0, 0]}, ValueError, r"logits must be \(B, C, H, W\), got .*\(?\[?4, 5"),
    "logits array": ({"logits": LOGITS.numpy()}, (TypeError, ValueError), "logits must be "),
    "iterations": ({"num_iterations": 2.5}, ValueError, r"(?<!_)num_iterations must be a whole number.*got 2.5"),
    "negative": ({"num_iterations": -1}, ValueError, r"(?<!_)num_iterations must be .*got -1"),
    "weight": ({"spatial_weight": -1.0}, ValueError, "weight of kernel 'spatial' must be 0 or more, got -1"),
    "image": ({"image": IMAGE[..., :2]}, ValueError, r"image must be \(2, G, 4, 5\)"),
    "engine": ({"engine": "fast"}, ValueError, "engine must be one of .*got 'fast'"),
    "compatibility": ({"compatibility": "Potts"}, ValueError, "compatibility must be one of .*got 'Potts'"),
}


@pytest.mark.parametrize("case", BAD_FUNCTION)
def test_bad_calls_of_the_function_are_named(case):
    change, error, message = BAD_FUNCTION[case]
    with pytest.raises(error, match=message):
        dense_crf(**{"image": IMAGE, "logits": LOGITS, **change})


def test_the_number_of_iterations_of_a_diagnosis_is_checked():
    for wrong in (-1, 2.5):
        with pytest.raises(ValueError, match="num_iterations must be a whole number, 0 or more, got"):
            DenseCRF(3).diagnose(LOGITS, IMAGE, num_iterations=wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_of_either_kind_under_autocast(dtype):
    image, logits = 255 * torch.rand(1, 3, 6, 7), torch.randn(1, 3, 6, 7).to(dtype)
    crf = DenseCRF(3)
    expected = crf(logits, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(crf(logits, image), expected)


def test_the_result_is_the_callers_own():
    image, logits = 255 * torch.rand(1, 3, 6, 7), torch.randn(1, 1, 6, 7)
    out = dense_crf(image, logits, spatial_weight=0.0, bilateral_weight=0.0)
    assert out.data_ptr() != logits.data_ptr()
