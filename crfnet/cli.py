"""The ``crfnet`` command: refine the labels of pictures, score labels against the truth, examine the installation.

Exit status: 0 done; 1 a file failed or the examination found a fault; 2 wrong usage, nothing was done; 130 interrupted;
141 nobody reads the output (``| head``).
"""

import argparse
import inspect
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TextIO

from crfnet import __version__, dense_crf
from crfnet.batch import plan, run
from crfnet.comparison import Comparison, named, widths
from crfnet.doctor import compile_kernels, describe, examine
from crfnet.layouts import LAYOUTS
from crfnet.ops import METHODS, NORMALIZATIONS
from crfnet.ops.gpu.target import TARGETS
from crfnet.refine import Refined, refine_file

_FILE_OPTIONS = ("logits", "num_classes", "confidence", "ignore_label", "max_pixels")
_CRF_OPTIONS = (
    "theta_alpha",
    "theta_beta",
    "theta_gamma",
    "spatial_weight",
    "bilateral_weight",
    "num_iterations",
    "normalization",
    "engine",
)


class UsageError(Exception):
    """The command line asks for what cannot be; nothing has been done."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv``, by default the process's own arguments; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone (| head) can be caught
    except UsageError as error:
        parser.exit(2, f"crfnet {args.command}: error: {error}\n")
    except KeyboardInterrupt:
        print("crfnet: interrupted; files already written are whole", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _silence(sys.stdout, sys.stderr)
        return 141  # 128 + SIGPIPE, as the shell reports it for other commands
    return status


def _silence(*streams: TextIO) -> None:
    """Let what the streams still hold go nowhere: Python flushes them at its end, and would complain again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crfnet", description="Dense conditional random fields.")
    parser.add_argument("--version", action="version", version=f"crfnet {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    refine = commands.add_parser(
        "refine",
        help="refine labels or class probabilities along the edges of a picture",
        description="Refine labels or class probabilities along the edges of a picture. With folders in place of "
        "files, refine every picture in IMAGE with the probabilities or labels of the same stem.",
    )
    refine.set_defaults(run=_refine)
    _add_files(refine)
    _add_crf(refine)
    evaluate = commands.add_parser(
        "evaluate",
        help="score label maps against the truth",
        description="Score label maps against the truth: pixel accuracy, mean accuracy, mean and frequency-weighted "
        "IoU of the whole set, each class, and bands along the boundaries. Every file counts, or none: a file that "
        "cannot be used is an error.",
    )
    evaluate.set_defaults(run=_evaluate)
    _add_evaluate(evaluate)
    doctor = commands.add_parser("doctor", help="say what is installed, and check each engine against its definition")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--compile",
        nargs="?",
        choices=("all", *TARGETS),
        const="all",
        metavar="CHIP",
        help=f"compile every GPU kernel as well, no GPU needed; for one of {', '.join(TARGETS)}, or all (default)",
    )
    return parser


def _add_files(refine: argparse.ArgumentParser) -> None:
    add = refine.add_argument
    add("image", metavar="IMAGE", type=Path, help="picture, or folder of pictures")
    source = refine.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--probs", type=Path, metavar="P.npy", help="class probabilities, floats (L, H, W); or a folder"
    )
    source.add_argument("--labels", type=Path, metavar="L.png", help="label map, indexed or grey; or a folder of them")
    add("-o", "--output", type=Path, required=True, metavar="OUT.png", help="label map to write, indexed; or a folder")
    add("--panel", type=Path, metavar="V.png", help="picture to write: image, before, after; or a folder")
    add("--save-probs", type=Path, metavar="Q.npy", help="marginals to write; or a folder")
    add("--overwrite", action="store_true", help="replace outputs that exist (inputs never are)")
    add("--workers", type=_whole(1), default=1, metavar="N", help="processes for a folder (%(default)s)")
    add("--threads", type=_whole(1), metavar="N", help="of each process; default: torch's choice, 1 with workers")

    add, default = refine.add_argument_group("reading the input").add_argument, _defaults(refine_file)
    add("--logits", action="store_true", help="the values in --probs are logits")
    add("--num-classes", type=_whole(1, 256), metavar="L", help="choose among 0..L-1; default: the labels that occur")
    inside = _number(0, 1, open_ends=True)
    add(
        "--confidence",
        type=inside,
        default=default["confidence"],
        metavar="P",
        help="probability of a given label (%(default)s)",
    )
    byte, unknown = _whole(0, 255), default["ignore_label"]
    add("--ignore-label", type=byte, default=unknown, metavar="I", help="label of unknown pixels (%(default)s)")
    limit = default["max_pixels"]
    add("--max-pixels", type=_whole(1), default=limit, metavar="N", help="refuse larger pictures (%(default)s)")


def _add_crf(refine: argparse.ArgumentParser) -> None:
    add, default = refine.add_argument_group("the CRF").add_argument, _defaults(dense_crf)
    width, weight = _number(0, open_ends=True), _number(0)
    for name, kind, text in (
        ("theta_alpha", width, "reach of the bilateral kernel, in pixels"),
        ("theta_beta", width, "its reach in colour, in levels of 0..255"),
        ("theta_gamma", width, "reach of the spatial kernel, in pixels"),
        ("spatial_weight", weight, "weight of the spatial kernel"),
        ("bilateral_weight", weight, "weight of the bilateral kernel"),
    ):
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=default[name], metavar="X", help=f"{text} (%(default)s)")
    times = default["num_iterations"]
    add(
        "--iterations",
        dest="num_iterations",
        type=_whole(0),
        default=times,
        metavar="N",
        help="mean-field updates (%(default)s)",
    )
    add(
        "--normalization", choices=NORMALIZATIONS, default=default["normalization"], help="of each kernel (%(default)s)"
    )
    add("--engine", choices=METHODS, default=default["engine"], help="of the filters (%(default)s)")


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add(
        "predictions",
        metavar="PREDICTIONS",
        type=_kind(named, "prediction"),
        help="folder of indexed or grey PNGs, or one of them, or NAME=FOLDER; without TRUTH a list of lines "
        "`prediction truth`, paths relative to the list",
    )
    add("truth", metavar="TRUTH", type=Path, nargs="?", help="folder of PNGs of the same stems, or one PNG")
    add(
        "--dataset",
        choices=LAYOUTS,
        default="plain",
        help="cityscapes: *_labelIds.png of the same frames, as trainIds (%(default)s: the same stems, as they are)",
    )
    add("--split", type=Path, metavar="LIST", help="score the names of this list alone, as ImageSets/.../val.txt")
    add(
        "--compare",
        type=_kind(named, "comparison"),
        action="append",
        default=[],
        metavar="[NAME=]PREDICTIONS",
        help="further predictions of the same truth: which classes gain over PREDICTIONS, which pay; may be repeated",
    )
    add("--num-classes", type=_whole(1, 256), metavar="L", help="labels are 0..L-1; default: the names, or what occurs")
    add("--ignore-label", type=_whole(0, 255), default=255, metavar="I", help="void in the truth (%(default)s)")
    add("--names", type=Path, metavar="FILE", help="class names, one a line, label 0 first")
    add(
        "--trimap", type=_kind(widths, "widths"), default=(), metavar="WIDTHS", help="of bands in pixels: 1,2,5 or 1-40"
    )
    add("--curve", type=Path, metavar="C.png", help="plot to write: scores over trimap widths 1..40")
    add("--panels", type=Path, metavar="FOLDER", help="pictures to write: truth, labels, mistakes of the worst images")
    add("--images", type=Path, metavar="PHOTOS", help="folder of photos to show in the panels")
    add("--worst", type=_whole(1), default=20, metavar="N", help="how many panels (%(default)s)")
    add("--json", type=Path, metavar="S.json", help="everything to write as JSON, scores as fractions")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--overwrite", action="store_true", help="replace outputs that exist (inputs never are)")


def _kind(parse: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    """``parse`` for argparse, which keeps no more of a ValueError than that there was one."""

    def kind(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    kind.__name__ = name
    return kind


def _defaults(function: Callable[..., object]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _number(low: float, high: float = math.inf, open_ends: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        inside = low < value < high if open_ends else low <= value <= high
        if not inside or math.isinf(value):
            least = "more than" if open_ends else "at least"
            most = f" and below {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {least} {low:g}{most}, got {text}")
        return value

    return number


def _whole(low: int, high: int = 2**62) -> Callable[[str], int]:
    def whole(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            most = f" and at most {high}" if high < 2**62 else ""
            raise argparse.ArgumentTypeError(f"must be at least {low}{most}, got {text}")
        return value

    return whole


def _doctor(args: argparse.Namespace) -> int:
    report = examine()
    if args.compile:
        built = compile_kernels(tuple(TARGETS) if args.compile == "all" else (args.compile,))
        report |= {"kernels": built["kernels"], "healthy": report["healthy"] and built["healthy"]}
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0 if report["healthy"] else 1


def _evaluate(args: argparse.Namespace) -> int:
    try:
        comparison = Comparison(
            [args.predictions, *args.compare],
            args.truth,
            split=args.split,
            layout=LAYOUTS[args.dataset],
            num_classes=args.num_classes,
            ignore_label=args.ignore_label,
            names=args.names,
            widths=args.trimap,
            curve=args.curve,
            json=args.json,
            panels=args.panels,
            photos=args.images,
            most=args.worst,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        raise UsageError(error) from error
    failures: list[str] = []
    with _progress(comparison.total > 1, comparison.total) as show:
        for prediction, failure in comparison.run():
            if failure and failure not in failures:  # a bad truth fails every method alike
                failures.append(failure)
                show(f"crfnet: {failure}", True)
            elif comparison.total > 1:
                show(f"{prediction}", False)
    if failures:
        files = "1 file" if len(failures) == 1 else f"{len(failures)} files"
        print(f"crfnet: no scores, as {files} could not be used", file=sys.stderr)
        return 1
    try:
        comparison.write()
    except (ValueError, OSError) as error:
        print(f"crfnet: {error}", file=sys.stderr)
        return 1
    print(comparison.text(markdown=args.markdown))
    return 0


def _refine(args: argparse.Namespace) -> int:
    if args.logits and args.probs is None:
        raise UsageError("--logits speaks of --probs, which is not given")
    places = {name: getattr(args, name) for name in ("output", "panel", "save_probs", "overwrite")}
    probabilities = args.probs is not None
    try:
        jobs = plan(args.image, args.probs if probabilities else args.labels, probabilities=probabilities, **places)
    except (ValueError, OSError) as error:
        raise UsageError(error) from error
    options = {name: getattr(args, name) for name in _FILE_OPTIONS + _CRF_OPTIONS}
    jobs = [{**job, **options} for job in jobs]

    failed = 0
    with (
        closing(run(jobs, workers=args.workers, threads=args.threads)) as outcomes,
        _progress(args.image.is_dir(), len(jobs)) as show,
    ):
        for job, result, reason in outcomes:
            failed += result is None
            show(f"{job['output']}: {_words(result)}" if result else f"crfnet: {reason}", result is None)
    if args.image.is_dir():
        print(f"{len(jobs) - failed} of {len(jobs)} pictures refined" + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


def _words(done: Refined) -> str:
    labels = "1 label" if done.labels == 1 else f"{done.labels} labels"
    return f"{done.width} x {done.height}, {labels}, {done.changed:.1%} of pixels changed, {done.seconds:.1f} s"


@contextmanager
def _progress(many: bool, total: int) -> Iterator[Callable[[str, bool], None]]:
    """How to show an outcome: a line for one picture; for many a bar, or without tqdm counted lines, on stderr."""
    if not many:
        yield lambda line, failed: print(line, file=sys.stderr if failed else sys.stdout)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        count = itertools.count(1)
        yield lambda line, failed: print(f"[{next(count)}/{total}] {line}", file=sys.stderr)
        return
    with tqdm(total=total, unit="picture", file=sys.stderr) as bar:

        def show(line: str, failed: bool) -> None:
            if failed:
                bar.write(line, file=sys.stderr)
            bar.update()

        yield show
