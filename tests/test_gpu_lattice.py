import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crfnet.ops import lattice, reference, simplex
from crfnet.ops.lattice import LatticeEngine

lattice_build = pytest.importorskip("crfnet.ops.gpu.lattice_build", reason="needs Triton")
from crfnet.ops.gpu.lattice import TritonLatticeEngine  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("device")


def draw(P: int, D: int, C: int = 3, scale: float = 2.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(P, D, generator=generator)
    return [features.to(device), *(torch.rand(P, C, generator=generator).to(device) for _ in range(2))]


def triton_engine(features: Tensor, counts: list[int] | None = None) -> TritonLatticeEngine:
    return TritonLatticeEngine(features, counts or [len(features)])


def truth_engine(features: Tensor, counts: list[int] | None = None) -> LatticeEngine:
    return LatticeEngine(features.double(), counts or [len(features)])


def assert_near(ours: Tensor, truth: Tensor, plain: Tensor | None = None) -> None:
    """Within float32 rounding of the largest entry; where given, within twice the error of the plain engine instead.

    Weights carry an absolute error of 2^-25 and every sum a relative one of 2^-24; there are about a dozen of them.
    """
    allowed = 1e-6 * truth.abs().max()
    if plain is not None:
        allowed = allowed + 2 * (plain - truth).abs().max()
    assert ours.dtype == torch.float32 and ours.shape == truth.shape
    assert (ours - truth).abs().max() <= allowed  # false for NaN


CASES = [  # P, D, C, counts: around the length of a chunk and the widths that kernels are compiled for
    (1, 5, 1, [1]),
    (2, 3, 300, [1, 1]),
    (63, 1, 21, [63]),
    (64, 2, 3, [64]),
    (65, 3, 40, [64, 0, 1]),
    (130, 5, 21, [1, 60, 69]),
    (130, 2, 33, [65, 65]),
    (40, 8, 5, [40]),
    (6, 16, 3, [4, 2]),
]


@pytest.mark.parametrize(("P", "D", "C", "counts"), CASES)
def test_operator_is_that_of_the_plain_engine(P, D, C, counts):
    features, values, _ = draw(P, D, C)
    ours, truth = triton_engine(features, counts), truth_engine(features, counts)
    plain = LatticeEngine(features, counts)
    assert ours.num_vertices == truth.num_vertices == plain.num_vertices
    for transpose in (False, True):
        assert_near(ours.apply(values, transpose), truth.apply(values.double(), transpose))
        # and the float32 engine, whose positions are a little off
        assert_near(ours.apply(values, transpose), plain.apply(values, transpose).double())


@pytest.mark.parametrize(("P", "D", "counts"), [(1, 2, [1]), (150, 1, [150]), (70, 3, [1, 0, 69]), (40, 5, [20, 20])])
def test_diagonal_is_that_of_the_plain_engine(P, D, counts):
    features, _, _ = draw(P, D, scale=1.0)
    assert_near(triton_engine(features, counts).diagonal(), truth_engine(features, counts).diagonal())


# channels: fewer and more than go through together, 32 // (D + 1)
@pytest.mark.parametrize(
    ("P", "D", "C", "counts"),
    [(65, 1, 40, [65]), (130, 5, 3, [60, 70]), (63, 5, 7, [63]), (5, 16, 2, [5]), (3, 33, 2, [3])],
)
def test_feature_gradient_is_that_of_the_plain_engine(P, D, C, counts, monkeypatch):
    monkeypatch.setattr(lattice, "NEGLIGIBLE_ENERGY", 0.0)  # of all channels
    features, values, grad = draw(P, D, C, scale=0.7)
    plain = LatticeEngine(features, counts).feature_gradient(values, grad)
    truth = truth_engine(features, counts).feature_gradient(values.double(), grad.double())
    ours = triton_engine(features, counts).feature_gradient(values, grad)
    assert_near(ours, truth, plain)


def test_feature_gradient_is_near_the_exact_one():
    features, values, grad = draw(400, 2, scale=1.0)
    ours = triton_engine(features).feature_gradient(values, grad)
    exact = reference.feature_gradient(features[None].double(), values[None].double(), grad[None].double())[0]
    assert float((ours - exact).norm() / exact.norm()) < 0.085  # as measured and allowed for the plain engine


@pytest.mark.parametrize("counts", [[70], [30, 40]])
def test_plan_makes_the_same_engine(counts):
    features, values, grad = draw(70, 3)
    engine = triton_engine(features, counts)
    plan = engine.plan()
    sizes = TritonLatticeEngine.plan_sizes(70, 3, len(counts))
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in plan] == [(s, d or torch.float32) for s, d in sizes]
    again = TritonLatticeEngine.from_plan(plan, features, counts)
    assert torch.equal(again.apply(values), engine.apply(values))
    assert torch.equal(again.feature_gradient(values, grad), engine.feature_gradient(values, grad))
    assert torch.equal(again.diagonal(), engine.diagonal())


@settings(max_examples=8)
@given(
    P=st.integers(1, 40),
    D=st.integers(1, 4),
    C=st.integers(1, 7),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_transpose_is_exact(P, D, C, scale, seed):
    features, x, y = draw(P, D, C, scale, seed)
    engine = triton_engine(features)
    forward, backward = engine.apply(x).double(), engine.apply(y, transpose=True).double()
    assert abs((forward * y).sum() - (x * backward).sum()) <= 1e-6 * (forward * y).sum()
    assert engine.num_vertices == truth_engine(features).num_vertices


@settings(max_examples=50)
@given(P=st.integers(1, 30), D=st.integers(1, 16), scale=st.sampled_from([0.01, 1.0, 1e3]), seed=st.integers(0, 2**31))
def test_digits_have_room_for_every_vertex_and_its_neighbours(P, D, scale, seed):
    features, _, _ = draw(P, D, scale=scale, seed=seed)
    _, _, corner = simplex.locate(features.double())
    needed = corner[:-1].amax(1) - corner[:-1].amin(1) + 5  # a simplex and neighbours reach 2 beyond on either side
    digits, hashed = mixed_radix(features, 3)
    if hashed:  # a box of wide features, or of many
        assert scale == 1e3 or D > 6
    else:
        assert digits[-1] == 1 and digits[0] == digits[1] * (D + 1)
        sizes = [larger // smaller for larger, smaller in zip(digits[1:-1], digits[2:], strict=True)]
        assert all(size >= need for size, need in zip(sizes, needed.tolist(), strict=True))


def test_a_photograph_needs_no_random_digits():
    """Positions of 2048x1024 pixels at a bandwidth of 30, colours of 0..255 at 3; 64 of them in a batch."""
    box = torch.tensor([[0.0] * 5, [1024 / 30, 2048 / 30, 85.0, 85.0, 85.0]], device=device)
    assert not mixed_radix(box, 64)[1]


def mixed_radix(features: Tensor, B: int) -> tuple[list[int], bool]:
    """The digits of item, remainder and coordinates, and whether they are random."""
    D = features.shape[1]
    low, high = features.aminmax(dim=0)
    digits = torch.empty(2, D + 2, dtype=torch.int64, device=device)
    hashed = torch.empty(1, dtype=torch.int32, device=device)
    random = lattice_build._random(D + 2, low.device)
    lattice_build._digits_kernel[(1,)](low, high, random, digits, hashed, B, simplex.KEY_LIMIT, D=D)
    return digits[0].tolist(), bool(hashed)


@pytest.mark.parametrize(("P", "D"), [(300, 2), (2100, 1)])  # over 5 chunks, and over more than are added at a time
def test_vertices_that_all_points_share(P, D):
    _, values, _ = draw(P, D)
    features = torch.full((P, D), 0.3, device=device)
    ours, truth = triton_engine(features), truth_engine(features)
    assert ours.num_vertices == D + 1
    assert_near(ours.apply(values), truth.apply(values.double()))


def test_small_terms_survive_beside_large_ones():
    """A vertex is not computed as a difference of running sums, in which small ones would drown."""
    features = torch.tensor([[0.0, 0.0]] * 40 + [[60.0, 60.0]] * 40, device=device)
    values = torch.cat([torch.full((40, 1), 1e6), torch.full((40, 1), 1e-6)]).to(device)
    out = triton_engine(features).apply(values)
    truth = truth_engine(features).apply(values.double())
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=0)


def test_built_twice_gives_the_same_bits():
    features, values, grad = draw(90, 3)
    first, second = triton_engine(features, [40, 50]), triton_engine(features, [40, 50])
    assert torch.equal(first.apply(values), second.apply(values))
    assert torch.equal(first.feature_gradient(values, grad), second.feature_gradient(values, grad))
    assert torch.equal(first.diagonal(), second.diagonal())


def test_items_do_not_see_each_other():
    features, values, _ = draw(90, 5)
    features[40:] *= 3  # another density, hence another blur
    together = triton_engine(features, [40, 50]).apply(values)
    for part in (slice(0, 40), slice(40, 90)):
        assert_near(together[part], triton_engine(features[part].clone()).apply(values[part]).double())


def test_random_digits_name_the_same_vertices(monkeypatch):
    features, values, _ = draw(70, 3)
    normal = triton_engine(features, [30, 40])
    monkeypatch.setattr(simplex, "KEY_LIMIT", 0)  # random digits for everyone
    hashed = triton_engine(features, [30, 40])
    assert hashed.num_vertices == normal.num_vertices
    assert_near(hashed.apply(values), normal.apply(values).double())


def test_random_digits_differ():
    digits = lattice_build._random(180, torch.device(device)).flatten()
    assert len(digits.unique()) == len(digits)
    bits = torch.stack([(digits >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert ((bits - 0.5).abs() < 5 * 0.5 / len(digits) ** 0.5).all()  # each bit is set half the time, to 5 sigma


def test_colliding_keys_end_as_nan(monkeypatch):
    features, values, grad = draw(65, 5)
    random = lattice_build._random
    monkeypatch.setattr(simplex, "KEY_LIMIT", 0)
    monkeypatch.setattr(
        lattice_build, "_random", lambda n, where: random(n, where) * torch.tensor([[0], [1]]).to(where)
    )
    engine = triton_engine(features)
    for out in (engine.apply(values), engine.feature_gradient(values, grad), engine.diagonal()):
        assert out.isnan().all()


@pytest.mark.parametrize("D", [1, 3, 6])
def test_far_from_the_origin_and_far_apart(D):
    features, values, _ = draw(65, D)
    features[30:] += 1e6  # up to spans that no digits have room for
    features = features.clamp(-1e6, 1e6)
    ours, truth = triton_engine(features), truth_engine(features)
    assert ours.num_vertices == truth.num_vertices
    # no worse than near the origin, since positions in the lattice are computed in float64
    assert_near(ours.apply(values), truth.apply(values.double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_features_that_are_no_positions_end_as_nan(bad):
    features, values, _ = draw(70, 3)
    features[5, 1] = bad
    engine = triton_engine(features)
    assert engine.num_vertices <= 70 * 4
    assert engine.apply(values)[5].isnan().all() and engine.diagonal()[5].isnan()


def test_too_many_points_are_refused():
    features = torch.empty(1, 1, device=device).expand(2**29 + 1, 1)  # 4 bytes
    with pytest.raises(ValueError, match="at most 536870912 points"):
        TritonLatticeEngine(features, [2**29 + 1])
