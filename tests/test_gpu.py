"""The doors on a GPU against the same doors in float64 on the CPU; without a GPU, Triton's interpreter plays one."""

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from crfnet import DenseCRF, Kernel
from crfnet.ops import NORMALIZATIONS, GaussianFilter, GridFilter, gaussian_filter, gpu, lattice
from crfnet.ops.gpu import serves

METHODS = ["exact", "lattice"]
# every normalisation with a mask or without one, "after" with and without
MASKED = [*((name, name in ("none", "symmetric")) for name in NORMALIZATIONS), ("after", True)]


def draw(B: int, N: int, D: int, C: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features ``(B, N, D)`` and values ``(B, N, C)``, float32 numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(B, N, D, generator=generator)
    return features.double(), torch.rand(B, N, C, generator=generator).double()


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference / largest value."""
    assert got.dtype == torch.float32 and got.shape == wanted.shape and bool(got.isfinite().all())
    return float((got.cpu().double() - wanted).abs().max() / wanted.abs().max())


def test_the_kernels_are_really_used(device):
    features, values = draw(1, 70, 3, 2)
    for method in METHODS:
        engine = GaussianFilter(features.float().to(device), method=method).engine
        assert type(engine).__name__ == f"Triton{method.capitalize()}Engine"
        assert not type(GaussianFilter(features, method=method).engine).__name__.startswith("Triton")
    assert serves(values.float().to(device)) and not serves(values.to(device))


@pytest.mark.parametrize(("normalization", "masked"), MASKED)
@pytest.mark.parametrize("method", METHODS)
def test_filters_and_gradients(device, method, normalization, masked, monkeypatch):
    monkeypatch.setattr(lattice, "NEGLIGIBLE_ENERGY", 0.0)  # the kernels leave no channels out
    features, values = draw(2, 70, 3, 5)
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(2)).double()

    def run(features: Tensor, values: Tensor, where: str) -> list[Tensor]:
        features, values = features.clone().requires_grad_(), values.clone().requires_grad_()
        here = None if mask is None else mask.to(where)
        out = gaussian_filter(
            features, values, method=method, normalization=normalization, mask=here, tolerance=1e-7, precision="float32"
        )
        return [out.detach(), *torch.autograd.grad(out, (features, values), grad.to(out))]

    wanted = run(features, values, "cpu")
    found = run(features.float().to(device), values.float().to(device), device)
    assert [error(*pair) < 2e-5 for pair in zip(found, wanted, strict=True)] == [True] * 3


@pytest.mark.parametrize("method", METHODS)
def test_removed_self_messages(device, method):
    features, values = draw(2, 70, 2, 3)
    wanted = gaussian_filter(features, values, method=method, normalization="after", remove_self=True, tolerance=1e-7)
    found = gaussian_filter(
        features.float().to(device),
        values.float().to(device),
        method=method,
        normalization="after",
        remove_self=True,
        tolerance=1e-7,
        precision="float32",
    )
    assert error(found, wanted) < 1e-4  # n is smaller by 1, hence more sensitive


@pytest.mark.parametrize("precision", ["float32", "tf32", "fp16"])
def test_a_pixel_alone_hears_nothing_once_it_does_not_hear_itself(device, precision):
    features, values = 1e3 * torch.arange(70.0)[None, :, None].to(device), torch.rand(1, 70, 4).to(device)
    found = gaussian_filter(
        features, values, method="exact", normalization="after", remove_self=True, precision=precision
    )
    assert found.abs().max() < 1e-3


@pytest.mark.parametrize("theta", [-3.0, 0.0, math.nan, math.inf])
def test_a_bandwidth_that_is_none_is_an_error_or_loud(device, theta):
    with pytest.raises(ValueError, match="theta must be positive"):
        GridFilter((5, 6), theta)
    if device == "cuda":  # a learnt one is not looked at
        out = GridFilter((5, 6), torch.tensor(theta, device=device))(torch.rand(1, 30, 2, device=device))
        assert bool(out.isnan().all())


# around a tile of points, a block of channels; few points where there are many features or channels, which take long
SIZES = [(1, 1, 1, 1), (3, 1, 2, 2), (1, 63, 1, 16), (1, 64, 2, 17), (1, 65, 4, 1), (2, 130, 5, 33)]
SIZES += [(1, 12, 16, 1), (1, 20, 9, 300)]


@pytest.mark.parametrize(("B", "N", "D", "C"), SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_any_size(device, method, B, N, D, C):
    features, values = draw(B, N, D, C, scale=1.0 / math.sqrt(D))
    wanted = gaussian_filter(features, values, method=method, normalization="after", tolerance=1e-7)
    found = GaussianFilter(
        features.float().to(device), method=method, normalization="after", tolerance=1e-7, precision="float32"
    )(values.float().to(device))
    assert error(found, wanted) < 2e-5


@pytest.mark.parametrize("scale", [3e2, 2e5])
@pytest.mark.parametrize("method", METHODS)
def test_features_far_apart_keep_to_themselves(device, method, scale):
    features, values = draw(2, 66, 4, 3, scale=scale)
    features = features.clamp(-1e6, 1e6)
    found = gaussian_filter(
        features.float().to(device),
        values.float().to(device),
        method=method,
        normalization="after",
        precision="float32",
    )
    assert error(found, values) < 1e-5


def test_inputs_may_lie_in_memory_as_they_like(device):
    features, values = draw(2, 40, 3, 4)
    wanted = gaussian_filter(features, values, normalization="after", tolerance=1e-7)
    features, values = features.float().to(device), values.float().to(device)
    apart = (features.mT.contiguous().mT, values.mT.contiguous().mT)
    found = gaussian_filter(*apart, normalization="after", tolerance=1e-7, precision="float32")
    assert error(found, wanted) < 2e-5
    halves = gaussian_filter(features, values.half(), normalization="after")
    assert halves.dtype == torch.float16 and error(halves.float(), wanted) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_results_repeat_to_the_last_bit(device, method):
    N = 130 if device == "cuda" else 66  # the interpreter has one program after the other anyway
    features, values = (tensor.float().to(device).requires_grad_() for tensor in draw(2, N, 5, 3))
    runs = []
    for _ in range(2):
        out = gaussian_filter(features, values, method=method, normalization="symmetric")
        runs.append([out, *torch.autograd.grad(out.square().sum(), (features, values))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


CONFIGURATIONS = {
    "CRF-RNN": {},
    "DeepLab": {"weights": "scalar", "compatibility": "potts", "engine": "lattice"},
    "bandwidths": {"learn": ("weights", "bandwidths"), "weights": "per_class", "compatibility": "per_class"},
    "symmetric": {"normalization": "symmetric", "remove_self": True},
    "damped": {"damping": 0.3, "normalization": "before"},
    "checkpointed": {"checkpoint": True},
    "kernels": {"kernels": [Kernel("colour", 2.0, theta_guide=60.0), Kernel("wide", 1.0, theta_position=9.0)]},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_layer_and_its_gradients(device, name, monkeypatch):
    monkeypatch.setattr(lattice, "NEGLIGIBLE_ENERGY", 0.0)
    generator = torch.Generator().manual_seed(0)
    image = (255 * torch.rand(2, 3, 7, 9, generator=generator)).round()
    logits = 2 * torch.randn(2, 3, 7, 9, generator=generator)
    crf = DenseCRF(3, theta_alpha=5.0, theta_beta=60.0, num_iterations=2, precision="float32", **CONFIGURATIONS[name])

    def run(crf: DenseCRF, image: Tensor, logits: Tensor) -> list[Tensor]:
        inputs = [logits.clone().requires_grad_(), *crf.parameters()]
        if name == "bandwidths":
            image = image.clone().requires_grad_()
            inputs.append(image)
        q = crf(inputs[0], image).softmax(1)
        return [q.detach(), *torch.autograd.grad(q.square().sum(), inputs)]

    wanted = run(crf.double(), image.double(), logits.double())
    found = run(crf.float().to(device), image.to(device), logits.to(device))
    for got, want in zip(found, wanted, strict=True):
        assert error(got, want) < 1e-3  # the exact engine's default tolerance, 3e-4, in both, not quite the same pairs


def test_inference_is_training_without_gradients(device):
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(1, 3, 8, 8, generator=generator).to(device)
    logits = 2 * torch.randn(1, 4, 8, 8, generator=generator).to(device)
    crf = DenseCRF(4, theta_alpha=5.0, theta_beta=60.0, num_iterations=3, num_iterations_eval=3).to(device)
    trained = crf(logits, image)
    with torch.no_grad():
        torch.testing.assert_close(crf.eval()(logits, image), trained.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("version", "reason"), [("3.2.0", "Triton 3.2.0 is older than 3.3"), ("3.10.1+git", "")])
def test_a_triton_that_is_too_old_is_named(monkeypatch, version, reason):
    monkeypatch.setattr(gpu.metadata, "version", lambda name: version)
    assert gpu._missing() == (reason if find_spec("triton") else "Triton is not installed")


good_features, good_values = torch.rand(2, 6, 3), torch.rand(2, 6, 4)
BAD = {
    "nan": {"features": good_features.clone().fill_(math.nan)},
    "infinite": {"features": good_features.clone().fill_(math.inf)},
    "huge": {"features": good_features * 1e8},
    "integers": {"features": good_features.long()},
    "no points": {"features": good_features[:, :0]},
    "no batch": {"features": good_features[0]},
    "integer values": {"values": good_values.long()},
    "other size": {"values": good_values[:, :5]},
    "no channel": {"values": good_values[:, :, :0]},
    "empty item": {"mask": torch.tensor([[True] * 6, [False] * 6])},
    "float mask": {"mask": torch.ones(2, 6)},
    "method": {"method": "fast"},
    "precision": {"precision": "bf16"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_bad_input_raises_the_same_error_on_both_devices(device, method, change):
    arguments = {"features": good_features, "values": good_values, "method": method, **change}
    with pytest.raises((TypeError, ValueError)) as on_cpu:
        plain(arguments)
    with pytest.raises(on_cpu.type) as on_gpu:
        gaussian_filter(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()})
    assert str(on_gpu.value).replace("cuda:0", "cpu") == str(on_cpu.value)


def plain(arguments: dict[str, object]) -> None:
    """Filter by the engines of plain PyTorch, also where the interpreter would take the tensors."""
    before, gpu._cpu_tensors = gpu._cpu_tensors, False
    try:
        gaussian_filter(**arguments)
    finally:
        gpu._cpu_tensors = before


def test_masked_points_may_hold_anything(device):
    features, values = draw(2, 40, 3, 4)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.5
    wanted = gaussian_filter(features, values, mask=mask, normalization="after", tolerance=1e-7)
    features[~mask], values[~mask] = math.nan, math.inf
    found = gaussian_filter(
        features.float().to(device),
        values.float().to(device),
        mask=mask.to(device),
        normalization="after",
        tolerance=1e-7,
        precision="float32",
    )
    assert error(found, wanted) < 2e-5


def test_a_grid_of_any_number_of_axes(device):
    for shape in ((50,), (7, 9), (3, 4, 5)):
        values = torch.rand(2, math.prod(shape), 3, generator=torch.Generator().manual_seed(0)).double()
        theta = torch.tensor(1.7, dtype=torch.float64)
        wanted = GridFilter(shape, theta, normalization="after")(values)
        assert error(GridFilter(shape, theta, normalization="after")(values.float().to(device)), wanted) < 1e-5


# What only a GPU can show


def layer(device: str = "cuda", C: int = 21, H: int = 60, W: int = 80, **settings) -> tuple[DenseCRF, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = (255 * torch.rand(1, 3, H, W, generator=generator)).round().to(device)
    logits = 3 * torch.randn(1, C, H, W, generator=generator).to(device)
    return DenseCRF(C, theta_alpha=30.0, theta_beta=40.0, **settings).to(device), logits, image


@pytest.mark.gpu
@pytest.mark.parametrize("engine", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_a_cuda_graph_replays_the_layer_on_new_inputs(engine, training):
    crf, logits, image = layer(engine=engine)
    logits.requires_grad_(training)

    def run() -> list[Tensor]:
        q = crf(logits, image)
        # detached: a graph kept from one stream would be met on another
        return [q.detach(), torch.autograd.grad(q.square().sum(), logits)[0]] if training else [q]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.set_grad_enabled(training):
        run()  # compile first
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.set_grad_enabled(training):
        captured = run()
    with torch.no_grad():
        logits.copy_(logits.flip(2))
        image.copy_(image.flip(3))
    graph.replay()
    with torch.set_grad_enabled(training):
        for got, want in zip(captured, run(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.gpu
def test_a_captured_layer_with_broken_inputs_says_nan():
    crf, logits, image = layer(engine="lattice")
    crf.eval()
    with torch.no_grad():
        crf(logits, image)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = crf(logits, image)
        image.fill_(math.nan)
        graph.replay()
    assert bool(out.isnan().any())


@pytest.mark.gpu
@pytest.mark.parametrize("engine", METHODS)
def test_other_streams(engine):
    features, values = (tensor.float().cuda() for tensor in draw(1, 3000, 5, 8))
    build = GaussianFilter(features, method=engine, normalization="after")
    wanted = build(values)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a kernel on another stream would not wait for the values
        found = build(values * 1.0)
    stream.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # inductor's, of products of class matrices
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what it imports
@pytest.mark.parametrize("engine", METHODS)
def test_the_default_compiler_on_a_gpu(engine):
    crf, logits, image = layer(engine=engine)
    logits.requires_grad_()
    compiled = torch.compile(crf, fullgraph=True)
    for _ in range(3):
        out = compiled(logits, image)
        torch.testing.assert_close(out.softmax(1), crf(logits, image).softmax(1), rtol=1e-3, atol=1e-3)
        out.square().sum().backward()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's, of the first that it captures
@pytest.mark.parametrize("engine", METHODS)
def test_the_compiler_s_own_cuda_graphs(engine):
    """Inference alone: torch 2.11 takes what it kept for backward as overwritten, and says so."""
    crf, logits, image = layer(engine=engine)
    compiled = torch.compile(crf, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            logits, image = logits.flip(2), image.flip(3)
            out = compiled(logits, image).softmax(1)
            torch.testing.assert_close(out, crf(logits, image).softmax(1), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_autocast_changes_nothing_inside():
    crf, logits, image = layer(engine="lattice")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = crf(logits, image)
    assert torch.equal(out, crf(logits, image))


@pytest.mark.gpu
@pytest.mark.parametrize("engine", METHODS)
def test_memory_at_the_size_of_a_photograph(engine):
    crf, logits, image = layer(H=375, W=500, engine=engine)
    logits.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        crf.eval()(logits, image)
    assert torch.cuda.max_memory_allocated() - before < 2**30


@pytest.mark.gpu
def test_more_numbers_than_32_bits_can_count():
    N, C = 2**20, 2**11 + 1
    features = torch.arange(N, device="cuda")[None, :, None] / 4.0
    values = torch.zeros(1, N, C, device="cuda")
    values[0, N // 2, -1] = values[0, N - 1, 0] = 1.0
    out = gaussian_filter(features, values, method="exact", precision="float32")
    beside = torch.exp(-0.5 * (torch.arange(-3, 4, device="cuda") / 4.0) ** 2)
    torch.testing.assert_close(out[0, N // 2 - 3 : N // 2 + 4, -1], beside, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out[0, N - 4 :, 0], beside[:4], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    crf, logits, image = layer()
    for arguments in ((logits, image.cpu()), (logits.cpu(), image)):
        with pytest.raises(ValueError, match="on c.*like the logits"):
            crf(*arguments)
    with pytest.raises(ValueError, match="values must be on cuda"):
        gaussian_filter(torch.rand(1, 9, 2, device="cuda"), torch.rand(1, 9, 2))
