"""The exact engine against brute force: correctness first, then build, apply and feature gradient.

    python benchmarks/exact.py --image photo.png --threads 1 --json results.json

Without --image the picture is procedural (textured regions, 500 x 375). Brute force is the same sum over all pairs, in
strips of the kernel that fit the cache, by the same matrix products and exp2; its time is measured on --brute-rows
rows and scaled to all, since every row costs the same. "plain" is the usual way to write it: strips of 256 whole rows,
torch.exp, which is slow where it underflows; the ratio is against the fast one. Errors are relative L2, against float64
on --rows random rows.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from _measure import (
    bilateral_features,
    environment,
    memory_mib,
    procedural_scene,
    relative_error,
    reset_peak_memory,
    timed,
)
from torch import Tensor

from crfnet.images import read_image
from crfnet.ops import reference
from crfnet.ops.exact import LOG2E, ExactEngine

MAX_ERROR = 1e-4  # a run that is less exact than this is not worth timing


def brute_force(features: Tensor, values: Tensor, rows: int) -> Tensor:
    """The first ``rows`` outputs from all N senders, strip by strip."""
    tile, chunk = 128, 2048
    features = features - features.mean(0)
    half = -0.5 * features.square().sum(1, keepdim=True)
    ones = torch.ones_like(half)
    a, b = LOG2E * torch.cat([features, half, ones], 1), torch.cat([features, ones, half], 1)
    out = values.new_zeros(values.shape[1], rows)
    kernel = values.new_empty(chunk, tile)
    for i in range(0, rows, tile):
        receivers = a[i : min(rows, i + tile)].T
        for j in range(0, len(values), chunk):
            senders = b[j : j + chunk]
            part = kernel[: len(senders), : receivers.shape[1]]
            torch.mm(senders, receivers, out=part)
            out[:, i : i + tile].addmm_(values[j : j + chunk].T, part.exp2_())
    return out.T


def brute_force_plain(features: Tensor, values: Tensor, rows: int) -> Tensor:
    """The first ``rows`` outputs, with 256 whole rows of the kernel at a time."""
    features = features - features.mean(0)
    half = 0.5 * features.square().sum(1)
    return torch.cat(
        [
            torch.exp(receivers @ features.T - half - own[:, None]) @ values
            for receivers, own in zip(features[:rows].split(256), half[:rows].split(256), strict=True)
        ]
    )


def measure(features: Tensor, values: Tensor, grad: Tensor, arguments: argparse.Namespace) -> dict[str, object]:
    """Check one setting, then time it."""
    N = len(features)
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(1))[: arguments.rows]
    truth = reference.gaussian_filter_chunked(features.double(), values.double(), rows)
    before = memory_mib("VmRSS")
    reset_peak_memory()
    engine = ExactEngine(features, [N], arguments.tolerance)
    error = relative_error(engine.apply(values)[rows], truth)
    if not error < MAX_ERROR:
        raise SystemExit(f"exact is {error:.1e} off the float64 oracle, more than {MAX_ERROR:.0e}: nothing to time")
    result: dict[str, object] = {
        "kept_fraction": engine.kept_fraction,
        "error_bound": engine.error_bound,
        "rounding_bound": engine.rounding_bound,
        "error": error,
        "build": timed(lambda: ExactEngine(features, [N], arguments.tolerance), arguments.repeats),
        "apply": timed(lambda: engine.apply(values), arguments.repeats),
        "feature_gradient": timed(lambda: engine.feature_gradient(values, grad), arguments.repeats),
        "memory_mib": memory_mib("VmHWM") - before,
    }
    head = min(N, arguments.brute_rows)
    truth = reference.gaussian_filter_chunked(features.double(), values.double(), torch.arange(min(head, len(rows))))
    for name, brute in (("brute_force", brute_force), ("brute_force_plain", brute_force_plain)):
        spent = timed(lambda brute=brute: brute(features, values, head), arguments.repeats)  # type: ignore[misc]
        result[name] = {key: seconds * N / head for key, seconds in spent.items()}
        result[name + "_error"] = relative_error(brute(features, values, len(truth)), truth)
    return result


def main() -> None:
    """Parse the command line, measure every setting, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="a picture; default: a procedural one")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"), help="of that one")
    parser.add_argument("--theta", nargs="+", default=["160/3", "67/3", "80/13"], help="theta_alpha/theta_beta")
    parser.add_argument("--channels", type=int, default=21)
    parser.add_argument("--tolerance", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512, help="rows checked against float64")
    parser.add_argument("--brute-rows", type=int, default=4096, help="rows that brute force is timed on")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.image is None:
        image = procedural_scene(*arguments.size)[0]
    else:
        image = read_image(arguments.image)
    N = image.shape[0] * image.shape[1]
    generator = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(N, arguments.channels, generator=generator)).softmax(1)  # marginals, as in a CRF
    grad = torch.randn(N, arguments.channels, generator=generator)
    report: dict[str, object] = {
        "image": arguments.image.name if arguments.image else "procedural",
        "height": image.shape[0],
        "width": image.shape[1],
        "channels": arguments.channels,
        "tolerance": arguments.tolerance,
        "environment": environment(),
    }
    print(json.dumps(report))
    print(
        "   theta  kept    bound    error |  build  apply  f.grad     MiB | brute (error)  plain (error)  brute/apply"
    )
    results: dict[str, dict[str, object]] = {}
    for theta in arguments.theta:
        alpha, beta = (float(part) for part in theta.split("/"))
        r = results[theta] = measure(bilateral_features(image, alpha, beta), values, grad, arguments)
        s = {key: value["median"] for key, value in r.items() if isinstance(value, dict)}
        print(
            f"{theta:>8} {r['kept_fraction']:5.1%} {r['error_bound']:8.1e} {r['error']:8.1e} | "
            f"{s['build']:5.2f}s {s['apply']:5.2f}s {s['feature_gradient']:6.2f}s {r['memory_mib']:7.0f} | "
            f"{s['brute_force']:5.1f}s {r['brute_force_error']:.0e}  {s['brute_force_plain']:5.1f}s "
            f"{r['brute_force_plain_error']:.0e}  {s['brute_force'] / s['apply']:8.1f}x"
        )
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
