"""The mean-field step against the float64 definition: plain, and fused on a GPU or in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from crfnet.ops import gpu
from crfnet.ops.step import step

VECTOR, MATRIX = "vector", "matrix"


@pytest.fixture(params=["plain", "fused"])
def where(request) -> str:
    """The device of the tensors."""
    return "cpu" if request.param == "plain" else request.getfixturevalue("device")


def definition(unary, messages, factors, couplings, marginals) -> Tensor:
    """Label by label, as the formula reads."""
    columns = list(unary.unbind(2))
    for m, f, coupling in zip(messages, factors, couplings, strict=True):
        heard = m if f is None else m * f
        for a in range(len(columns)):
            if coupling.ndim == 1:
                columns[a] = columns[a] + coupling[a] * heard[:, :, a]
            else:
                columns[a] = columns[a] - (heard * coupling[a]).sum(2)
    energy = torch.stack(columns, 2)
    power = (energy - energy.amax(2, keepdim=True)).exp()
    return power / power.sum(2, keepdim=True) if marginals else energy


def draw(where: str, B: int, N: int, C: int, kinds: list[str], factor: str = "own", seed: int = 0):
    """Inputs in float32: unary, messages, factors (one an item, one for all, none, or each in turn), couplings."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(where)

    several = ["own", "shared", "none"] if factor == "mixed" else [factor]
    factors = []
    for k in range(len(kinds)):
        shape = {"own": (B, N, 1), "shared": (1, N, 1), "none": None}[several[k % len(several)]]
        factors.append(None if shape is None else torch.rand(shape, generator=generator).to(where) + 0.5)
    messages = [normal(B, N, C) for _ in kinds]
    couplings = [normal(C) if kind == VECTOR else normal(C, C) / C**0.5 for kind in kinds]
    return 2 * normal(B, N, C), messages, factors, couplings, normal(B, N, C)


def run(function, inputs, marginals, dtype):
    """Output, and gradients of sum(out * weights) to unary, messages, factors and couplings."""
    *tensors, weights = inputs

    def leaf(x):
        return None if x is None else x.to(dtype).requires_grad_()

    unary = leaf(tensors[0])
    messages, factors, couplings = ([leaf(x) for x in group] for group in tensors[1:])
    out = function(unary, messages, factors, couplings, marginals=marginals)
    leaves = [x for x in [unary, *messages, *factors, *couplings] if x is not None]
    return out.detach(), torch.autograd.grad((out * weights.to(dtype)).sum(), leaves)


def compare(inputs, marginals):
    """Outputs and gradients err by at most twice what the definition does in float32, and a few roundings.

    These are for tensors where luck made that error nothing. torch's softmax, which the plain step uses, rounds <q, g>
    in backward: where q is nearly 1 that costs some more.
    """
    roundings = 8 if gpu.serves(inputs[0]) else 24
    truth, gradients = run(lambda *x, marginals: definition(*x, marginals), inputs, marginals, torch.float64)
    plain, plain_gradients = run(lambda *x, marginals: definition(*x, marginals), inputs, marginals, torch.float32)
    ours, our_gradients = run(step, inputs, marginals, torch.float32)
    scales = [x.abs().max() for x in [truth, *gradients]]
    # gradients to couplings are sums over all pixels, whose terms may cancel: what is rounded is the size of the terms
    _, messages, factors, couplings, _ = inputs
    for k in range(len(couplings)):
        heard = messages[k] if factors[k] is None else messages[k] * factors[k]
        sizes = gradients[0].abs().flatten(0, 1).mT @ heard.abs().double().flatten(0, 1)  # (C, C)
        scales[len(scales) - len(couplings) + k] = (sizes if couplings[k].ndim == 2 else sizes.diagonal()).max()
    everything = zip([ours, *our_gradients], [plain, *plain_gradients], [truth, *gradients], scales, strict=True)
    for got, rough, exact, scale in everything:
        assert got.shape == exact.shape and got.dtype == torch.float32
        assert (got - exact).abs().max() <= 2 * (rough - exact).abs().max() + roundings * 2**-24 * scale


@pytest.mark.parametrize("marginals", [True, False])
@pytest.mark.parametrize(
    ("B", "N", "C", "kinds", "factor"),
    [
        (1, 1, 1, [VECTOR], "own"),
        (2, 70, 1, [VECTOR, VECTOR], "shared"),
        (1, 1025, 2, [VECTOR, VECTOR], "own"),  # one past a tile of 1024 pixels
        (2, 65, 21, [VECTOR, VECTOR], "own"),
        (2, 64, 21, [MATRIX, MATRIX], "shared"),
        (2, 63, 21, [VECTOR, MATRIX], "mixed"),
        (1, 130, 17, [MATRIX, VECTOR], "mixed"),
        (2, 33, 33, [MATRIX], "none"),
        (1, 65, 64, [MATRIX, MATRIX], "own"),
        (2, 31, 65, [MATRIX, VECTOR], "shared"),  # a matrix that the kernel leaves to torch
        (1, 9, 171, [VECTOR], "none"),
        (2, 5, 300, [VECTOR, MATRIX], "own"),
        (1, 3, 1024, [VECTOR, VECTOR], "own"),
        (2, 3, 1030, [VECTOR, VECTOR], "mixed"),  # labels in two parts
        (1, 2, 2500, [], "own"),
        (2, 40, 21, [], "own"),
        (2, 20, 5, [VECTOR, MATRIX, VECTOR], "mixed"),
        (1, 20, 5, [MATRIX, VECTOR, VECTOR, MATRIX], "mixed"),
        (2, 7, 3, [VECTOR, VECTOR, MATRIX, VECTOR, VECTOR], "shared"),
    ],
)
def test_outputs_and_all_gradients(where, B, N, C, kinds, factor, marginals):
    compare(draw(where, B, N, C, kinds, factor), marginals)


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {5, 6}, {4}, set()])
@pytest.mark.parametrize("kind", [VECTOR, MATRIX])
def test_only_wanted_gradients(device, kind, wanted):
    """Each input alone: unary, message, factor and coupling of two terms."""
    unary, messages, factors, couplings, weights = draw(device, 2, 19, 4, [kind, VECTOR], "own")
    inputs = [unary, *(x for term in zip(messages, factors, couplings, strict=True) for x in term)]

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_(k in wanted) for k, x in enumerate(inputs)]
        out = function(leaves[0], leaves[1::3], leaves[2::3], leaves[3::3])
        assert out.requires_grad == bool(wanted)
        if wanted:
            (out * weights.to(dtype)).sum().backward()
        return [x.grad for x in leaves]

    truth = gradients(lambda *x: definition(*x, True), torch.float64)
    ours = gradients(lambda *x: step(*x, marginals=True), torch.float32)
    for k, (got, exact) in enumerate(zip(ours, truth, strict=True)):
        assert (got is not None) == (exact is not None) == (k in wanted)
        if exact is not None:
            # sums of at most 2 * 19 * 4 numbers near 1, rounded at 6e-8 each, and a handful of products before
            torch.testing.assert_close(got, exact.float(), rtol=2e-5, atol=2e-6)


def test_logits_far_apart(where):
    """A softmax neither overflows nor forgets: logits of ±1e4, all alike, and labels that are ruled out by -inf."""
    rows = [[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, -1e4 + 1], [0.0, -torch.inf, 1.0]]
    unary = torch.tensor([rows], device=where)
    q = step(unary, [], [], [], marginals=True)
    torch.testing.assert_close(q, unary.double().softmax(2).float(), rtol=1e-6, atol=1e-9)
    long = torch.full((1, 2, 1500), -1e4, device=where)
    long[0, 0, 1499], long[0, 1, 3] = 1e4, 1e4  # the largest in the last part, and in the first
    assert torch.equal(step(long, [], [], [], marginals=True), long.softmax(2))


def test_without_terms_logits_are_the_unary(where):
    unary = torch.randn(1, 4, 3, device=where)
    assert torch.equal(step(unary, [], [], [], marginals=False), unary)


def test_inputs_need_not_be_contiguous(where):
    unary, messages, factors, couplings, _ = draw(where, 2, 6, 5, [VECTOR, MATRIX], "own")
    wanted = step(unary, messages, factors, couplings, marginals=True)

    def turned(x: Tensor) -> Tensor:
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    strewn = (turned(unary), [turned(m) for m in messages], [f.expand(-1, -1, 2)[..., :1] for f in factors])
    out = step(*strewn, [c.mT.contiguous().mT if c.ndim == 2 else c for c in couplings], marginals=True)
    # the plain formula's matrix product may add up in another order
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-7)


def test_gradient_that_is_expanded(where):
    """The gradient of a plain sum comes without memory of its own."""
    energy = torch.randn(2, 5, 4, device=where, requires_grad=True)
    step(energy, [], [], [], marginals=True).sum().backward()
    assert energy.grad.abs().max() <= 1e-6  # marginals sum to 1 whatever the energy


def test_same_bits_each_time(device):
    inputs = draw(device, 2, 130, 21, [VECTOR, MATRIX], "shared")
    first, first_gradients = run(step, inputs, True, torch.float32)
    second, second_gradients = run(step, inputs, True, torch.float32)
    assert torch.equal(first, second)
    assert all(map(torch.equal, first_gradients, second_gradients))


def test_empty(where):
    nothing = torch.empty(1, 0, 3, device=where)
    out = step(nothing, [nothing], [None], [torch.ones(3, device=where)], marginals=True)
    assert out.shape == (1, 0, 3)


@pytest.mark.parametrize("kinds", [[], [VECTOR], [VECTOR, MATRIX]])
@pytest.mark.parametrize("marginals", [True, False])
def test_registration(device, kinds, marginals):
    unary, messages, factors, couplings, _ = draw(device, 2, 5, 3, kinds, "mixed")
    terms = [x for term in zip(messages, factors, couplings, strict=True) for x in term]
    terms = [None if x is None else x.requires_grad_(k != 1) for k, x in enumerate(terms)] + [None] * (6 - len(terms))
    step(unary, [], [], [], marginals=True)  # registers it
    torch.library.opcheck(torch.ops.crfnet.step.default, (marginals, unary.requires_grad_(), *terms))


@pytest.mark.parametrize("kinds", [[], [VECTOR, MATRIX], [VECTOR, VECTOR, VECTOR]])
def test_compiled_is_the_same(where, kinds):
    inputs = draw(where, 2, 5, 3, kinds, "mixed")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, gradients = run(step, inputs, True, torch.float32)
    again, again_gradients = run(compiled, inputs, True, torch.float32)
    for got, wanted in zip([again, *again_gradients], [out, *gradients], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_autocast_does_not_reach_in(device):
    unary, messages, factors, couplings, _ = draw(device, 1, 6, 70, [MATRIX], "own")
    wanted = step(unary, messages, factors, couplings, marginals=False)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(step(unary, messages, factors, couplings, marginals=False), wanted)
