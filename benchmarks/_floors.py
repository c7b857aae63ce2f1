"""What the GPU's work counts, and the least time that such counts can take: counts over measured peaks.

N points of D features, C channels, M vertices of the lattice. Bytes are those that must move if nothing stays in a
cache from one kernel to the next, and they are charged as traffic to DRAM: where data does stay in the L2 cache, as in
the blur of a small lattice, less than this floor is possible. What a kernel moves twice or recomputes is its own
affair.
"""

import math

Work = dict[str, float]  # by resource: "bytes" of memory, "flops" in float32, "tf32", "fp16", "exps"


def floor(work: Work, peak: dict[str, float]) -> tuple[float, str]:
    """Fewest seconds possible, and the resource that sets them."""
    bound = max(work, key=lambda resource: work[resource] / peak[resource])
    return work[bound] / peak[bound], bound


def exact_work(pairs: float, N: int, D: int, C: int, precision: str) -> Work:
    """K v over so many pairs: D + 2 multiply-adds for a distance, one power of two, C multiply-adds in matrix units.

    Three products in tf32 make one in float32.
    """
    matrix, products = ("tf32", 3.0) if precision == "float32" else (precision, 1.0)
    products *= 2.0 * pairs * C
    return {"exps": pairs, matrix: products, "flops": 2.0 * pairs * (D + 2), "bytes": 4.0 * N * (D + 2 * C)}


def exact_gradient_work(pairs: float, N: int, D: int, C: int) -> Work:
    """Its gradient to the features: 2 C multiply-adds for g_i·v_j + v_i·g_j, D + 1 for the sum of differences."""
    flops = 2.0 * pairs * (2 * D + 4)  # distances, and the weights times the features, which want float32
    return {"exps": pairs, "tf32": 4.0 * pairs * C, "flops": flops, "bytes": 4.0 * N * (2 * D + 2 * C)}


def splat_work(N: int, M: int, D: int, C: int) -> Work:
    """Every value read once, every entry's weight, vertex and point, every vertex written; slice is its mirror."""
    return {"bytes": 4.0 * (N * C + M * C + 3 * N * (D + 1)), "flops": 2.0 * N * (D + 1) * C}


def blur_work(M: int, D: int, C: int) -> Work:
    """D + 1 passes over the vertices, each reading the values and two neighbours' numbers, and writing."""
    return {"bytes": 4.0 * M * (D + 1) * (2 * C + 2), "flops": 4.0 * M * (D + 1) * C}


def build_work(N: int, M: int, D: int) -> Work:
    """Features in; keys out and, after sorting, in again; weights, vertices and neighbours out."""
    return {"bytes": 4.0 * N * D + N * (D + 1) * (8 + 8 + 4 + 4 + 4) + 8.0 * M * (D + 1)}


def grid_work(N: int, C: int, theta: float) -> Work:
    """Two passes, each value read and written once; products in float32 by whichever unit is faster, which is tf32."""
    radius = math.ceil(5.3 * theta)
    return {"bytes": 2 * 8.0 * N * C, "tf32": 3 * 2 * 2.0 * (2 * radius + 1) * N * C}


def step_work(N: int, C: int, terms: int, backward: bool) -> Work:
    """Unary and messages in, marginals out; back: marginals, their gradient and messages in, all gradients out."""
    tensors = 2 + terms + (1 + terms if backward else 0)
    return {"bytes": 4.0 * N * C * tensors, "exps": 0.0 if backward else 1.0 * N * C}


def total(*works: Work, times: float = 1.0) -> Work:
    """The counts of one thing after another."""
    keys = {key for work in works for key in work}
    return {key: times * sum(work.get(key, 0.0) for work in works) for key in keys}


def inference_work(N: int, M: int, C: int, theta: float, iterations: int) -> Work:
    """Mean field with the lattice over 5 features and the grid: the build, and each iteration's filters and step."""
    update = total(_filters_work(N, M, C, theta), step_work(N, C, 2, False), times=iterations)
    return total(build_work(N, M, 5), update)


def training_work(N: int, M: int, C: int, theta: float, iterations: int) -> Work:
    """Forward, and back through each iteration's step and filters once more."""
    filters = _filters_work(N, M, C, theta)
    steps = (step_work(N, C, 2, False), step_work(N, C, 2, True))
    return total(build_work(N, M, 5), total(filters, filters, *steps, times=iterations))


def _filters_work(N: int, M: int, C: int, theta: float) -> Work:
    return total(splat_work(N, M, 5, C), blur_work(M, 5, C), splat_work(N, M, 5, C), grid_work(N, C, theta))
