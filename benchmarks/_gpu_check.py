"""Whether the GPU engines are right, against the float64 oracle; benchmarks/gpu.py times nothing before this."""

import contextlib
import traceback
from collections.abc import Iterator

import torch
from _gpu_problems import PRECISIONS, THETA, Problem, draw, exact_engine, inference, lattice_engine
from _measure import relative_error
from torch import Tensor

from crfnet.ops import GridFilter, reference
from crfnet.ops.lattice import LatticeEngine
from crfnet.ops.step import step


class Limits:
    """Errors and what they may be at most; collected, so that one look tells all that is wrong."""

    def __init__(self, errors: dict[str, float]) -> None:
        self.errors, self.broken = errors, list[str]()

    def __call__(self, what: str, error: float, most: float) -> None:
        """Note an error."""
        self.errors[what] = error
        if not error <= most:  # NaN is too large as well
            self.broken.append(f"{what}: error {error:.2e}, more than {most:.1e}")

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """One part of the checks; when it fails to run, that counts as an error, and the other parts go on."""
        try:
            yield
        except Exception:
            self.broken.append(f"{what}: {traceback.format_exc().strip()}")


def check(p: Problem, expected: Tensor, rows: Tensor, iterations: int, errors: dict[str, float]) -> dict[str, float]:
    """Errors of everything on a problem, against float64.

    Args:
        p: on the device.
        expected: marginals ``(1, C, H, W)`` by the CPU's engines, after so many iterations.
        rows: points compared with brute force over all pairs.
        iterations: of mean field.
        errors: where they go, and what is returned.

    Raises:
        ArithmeticError: some are too large, or some part could not run; the message lists all of them.
    """
    device, C = p.features.device, p.logits.shape[1]
    v, g = draw(len(p.features), C, device)
    truth, n, slope = oracle(p.features, v, g, rows)
    limit = Limits(errors)
    for precision in PRECISIONS:
        with limit.part(f"exact {precision}"):
            engine = exact_engine(p.features, 3e-4, precision)
            out = engine.apply(v)[rows]
            limit(f"exact {precision}", relative_error(out, truth), 5e-4 if precision == "float32" else 2e-3)
            allowed = float(engine.error_bound + engine.rounding_bound) * n * v.max()
            limit(f"exact {precision} by its bound", float(((out - truth).abs() / allowed).max()), 1.0)
            # a difference of sums that nearly cancel: roundings of the products weigh several times as much
            limit(f"exact {precision} gradient", relative_error(engine.feature_gradient(v, g)[rows], slope), 2e-2)
    with limit.part("lattice"):
        ones = torch.ones_like(v[:, :1])
        lattices = [lattice_engine(p.features), LatticeEngine(p.features.cpu(), [len(v)])]
        near: list[list[float]] = []
        for engine, where in zip(lattices, (device, torch.device("cpu")), strict=True):
            x, y, one, chosen = (t.to(where) for t in (v, g, ones, rows))
            message = engine.apply(x)[chosen] / engine.apply(one)[chosen]
            gradient = engine.feature_gradient(x, y)[chosen]
            near.append([relative_error(message, (truth / n).to(where)), relative_error(gradient, slope.to(where))])
        for what, (ours, theirs) in zip(("message", "gradient"), zip(*near, strict=True), strict=True):
            errors[f"lattice {what} on the CPU"] = theirs
            limit(f"lattice {what}", ours, 1.05 * theirs + 2e-3)  # the same approximation, up to ties of rounding
    with limit.part("grid"):
        theta = torch.tensor(THETA[2], dtype=torch.float64, device=device)
        grid = GridFilter((p.image.shape[2], p.image.shape[3]), theta, normalization="after")
        limit("grid", relative_error(grid(v[None]), grid(v[None].double())), 1e-5)
    with limit.part("step"):
        error = relative_error(stepped(v, g, torch.float32), stepped(v, g, torch.float64))
        limit("step and its gradients", error, 1e-4)
    with limit.part("CRF"):
        q = inference(p, "lattice", iterations)().softmax(1)
        error = float((q.cpu() - expected).abs().mean())
        limit("CRF, mean difference of marginals from the CPU's", error, 2e-3)
    if limit.broken:
        raise ArithmeticError("\n".join([*limit.broken, f"{len(limit.broken)} checks failed; nothing is timed"]))
    return errors


def stepped(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """A step of two terms and all its gradients in one vector; float64 is plain PyTorch on any device."""
    C = v.shape[1]
    matrix = torch.randn(C, C, generator=torch.Generator().manual_seed(3)).to(v)
    inputs = [g[None], v[None], v.flip(0)[None].contiguous(), matrix[0].contiguous(), matrix]
    unary, m0, m1, s0, s1 = leaves = [t.to(dtype).requires_grad_() for t in inputs]
    q = step(unary, [m0, m1], [None, None], [s0, s1], marginals=True)
    grads = torch.autograd.grad((q * v.flip(1)[None].to(dtype)).sum(), leaves)
    return torch.cat([t.detach().double().flatten() / t.detach().double().norm() for t in (q, *grads)])


def oracle(
    features: Tensor, values: Tensor, grad: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # (R, C), (R, 1), (R, D) float64
    """Rows of K v, of K 1 and of the gradient of sum(grad * K v) to the features, by brute force over all pairs."""
    f, v, g = features.double(), values.double(), grad.double()
    C, D = v.shape[1], f.shape[1]
    moments = [x * f[:, d : d + 1] for d in range(D) for x in (v, g)]  # sum_j K_ij v_j f_j and the like
    sums = reference.gaussian_filter_chunked(f, torch.cat([torch.ones_like(f[:, :1]), v, g, *moments], 1), rows)
    n, kv, kg, *parts = sums.split([1] + [C] * (2 + 2 * D), 1)
    own = (g[rows] * kv + v[rows] * kg).sum(1, keepdim=True)
    slopes = [
        (g[rows] * kvf + v[rows] * kgf).sum(1, keepdim=True) for kvf, kgf in zip(parts[::2], parts[1::2], strict=True)
    ]
    return kv, n, torch.cat(slopes, 1) - own * f[rows]
