"""Message passing and the layer inside graphs: registration, torch.compile, torch.export."""

import shutil

import pytest
import torch
from torch import Tensor

from crfnet import DenseCRF, Kernel
from crfnet.ops import NORMALIZATIONS, GridFilter, gaussian_filter, traced

METHODS = ["exact", "lattice"]
# every normalisation with a mask or without one, "after" with and without
MASKED = [*((name, name in ("none", "symmetric")) for name in NORMALIZATIONS), ("after", True)]
# A graph has every iteration written out, and takes as much longer to compile: two have all that more would have.
FEW = {"num_iterations": 2, "num_iterations_eval": 2}
# Autograd through a compiled operation inspects inputs of the compiled function; torch 2.13 warns of its own inner use.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def draw(*, N: int = 90, C: int = 4, D: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = 2 * torch.randn(2, N, D, generator=generator)
    return features, torch.rand(2, N, C, generator=generator), torch.rand(2, N, generator=generator) > 0.3


def scene(B: int = 2, C: int = 4, H: int = 9, W: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = (255 * torch.rand(B, 3, H, W, generator=generator)).round()
    return 3 * torch.randn(B, C, H, W, generator=generator), image


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_operations_are_registered_properly(method, masked):
    features, values, mask = draw()
    mask = mask if masked else None
    arguments = (features, mask, method, 3e-4, "tf32", True)
    torch.library.opcheck(traced.build, arguments)
    plan = traced.build(*arguments)
    for transpose in (False, True):
        inputs = (
            plan,
            features.clone().requires_grad_(),
            values.clone().requires_grad_(),
            mask,
            method,
            "tf32",
            transpose,
        )
        torch.library.opcheck(traced.apply, inputs)
    torch.library.opcheck(traced.feature_gradient, (plan, features, values, values + 1, mask, method, "tf32"))


@pytest.mark.parametrize(("normalization", "masked"), MASKED)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_filter_is_the_eager_one(method, normalization, masked):
    features, values, mask = draw()

    def filtered(features: Tensor, values: Tensor) -> Tensor:
        return gaussian_filter(
            features, values, method=method, normalization=normalization, mask=mask if masked else None
        )

    agree(filtered, features, values)


def test_a_compiled_filter_without_its_self_messages():
    features, values, _ = draw()
    agree(
        lambda f, v: gaussian_filter(f, v, method="lattice", normalization="after", remove_self=True), features, values
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_compiled_grid_filter_is_the_eager_one(normalization):
    values, theta = torch.rand(2, 20, 3), torch.tensor([1.5, 0.7])
    agree(lambda v, theta: GridFilter((4, 5), theta, normalization=normalization)(v), values, theta)


def agree(function, *inputs: Tensor) -> None:
    """Outputs and gradients, compiled in one graph and eager. Both run the same operations in the same order."""
    inputs = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(out, inputs, grad)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, out, rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(compiled, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


CONFIGURATIONS = {
    "CRF-RNN": {},
    "DeepLab": {"weights": "scalar", "compatibility": "potts", "engine": "lattice"},
    "bandwidths": {"learn": ("weights", "bandwidths"), "weights": "per_class", "compatibility": "per_class"},
    "symmetric": {"normalization": "symmetric", "remove_self": True, "engine": "exact"},
    "damped": {"damping": 0.3},
    "checkpointed": {"checkpoint": True},
    "kernels": {"kernels": [Kernel("colour", 2.0, theta_guide=20.0), Kernel("wide", 1.0, theta_position=9.0)]},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_compiled_crf_is_the_eager_one(name, training):
    logits, image = scene()
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=30.0, **FEW, **CONFIGURATIONS[name]).train(training)
    logits.requires_grad_(training)
    parameters = list(crf.parameters())
    out = crf(logits, image)
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")(logits, image)
    torch.testing.assert_close(compiled.softmax(1), out.softmax(1), rtol=1e-5, atol=1e-5)
    if training:
        wanted = torch.autograd.grad(out.softmax(1).square().sum(), [logits, *parameters])
        found = torch.autograd.grad(compiled.softmax(1).square().sum(), [logits, *parameters])
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_compiled_crf_with_a_mask():
    logits, image = scene()
    mask = torch.rand(2, 9, 11, generator=torch.Generator().manual_seed(3)) > 0.4
    image = image.masked_fill(~mask.unsqueeze(1), float("nan"))
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=30.0, **FEW).eval()
    out = torch.compile(crf, fullgraph=True, backend="aot_eager")(logits, image, mask)
    torch.testing.assert_close(out.softmax(1), crf(logits, image, mask).softmax(1), rtol=1e-5, atol=1e-5)


def test_a_compiled_crf_still_refuses_infinite_features():
    logits, image = scene()
    crf = torch.compile(DenseCRF(4, **FEW).eval(), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="features must be finite"):
        crf(logits, image.fill_(float("nan")))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler, there is no g++")
def test_the_default_compiler_takes_the_layer_for_any_size():
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=30.0, **FEW).eval()
    compiled = torch.compile(crf, fullgraph=True, dynamic=True)
    for shape in ((9, 11), (12, 7)):
        logits, image = scene(1, 4, *shape)
        torch.testing.assert_close(
            compiled(logits, image).softmax(1), crf(logits, image).softmax(1), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("engine", METHODS)
def test_an_exported_crf_takes_other_sizes(engine):
    logits, image = scene()
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=30.0, engine=engine, **FEW).eval()
    sizes = {0: torch.export.Dim("B"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    loaded = torch.export.export(crf, (logits, image), dynamic_shapes=(sizes, sizes)).module()
    for shape in ((1, 7, 12), (3, 10, 5)):
        logits, image = scene(shape[0], 4, *shape[1:])
        torch.testing.assert_close(
            loaded(logits, image).softmax(1), crf(logits, image).softmax(1), rtol=1e-5, atol=1e-5
        )


def test_a_second_derivative_through_a_graph_is_refused():
    features, values, _ = draw()
    program = torch.export.export(Filter(), (features, values)).module()
    features.requires_grad_()
    values.requires_grad_()
    (grad,) = torch.autograd.grad(program(features, values).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()


class Filter(torch.nn.Module):
    def forward(self, features: Tensor, values: Tensor) -> Tensor:
        return gaussian_filter(features, values, method="exact")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's, of what it loads itself
@pytest.mark.parametrize("engine", METHODS)
def test_an_exported_crf_runs_alone(engine, tmp_path):
    logits, image = scene()
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=30.0, engine=engine, **FEW).eval()
    program = torch.export.export(crf, (logits, image))
    torch.export.save(program, tmp_path / "crf.pt2")
    loaded = torch.export.load(tmp_path / "crf.pt2").module()
    logits, image = logits.flip(2), image.flip(3)  # other values than it was traced with
    torch.testing.assert_close(loaded(logits, image).softmax(1), crf(logits, image).softmax(1), rtol=1e-5, atol=1e-5)
