"""One picture's labels refined by a dense CRF, from files to files: the job behind the command ``crfnet refine``.

From Python:

    refine_file("street.jpg", "street.png", labels="coarse.png", panel="look.png", theta_alpha=80.0)
"""

import os
import time
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crfnet import dense_crf, images, logits_from_labels, logits_from_probabilities
from crfnet.images import PathLike

# float16 probabilities sum to 1 within 2^-11, about 5e-4; what is further off was not meant to be probabilities
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Refined:
    """What `refine_file` did."""

    width: int
    height: int
    labels: int  # different labels in the result
    changed: float  # share of the pixels, unknown ones apart, that changed label
    seconds: float


def refine_file(
    image: PathLike,
    output: PathLike,
    *,
    probs: PathLike | None = None,
    labels: PathLike | None = None,
    logits: bool = False,
    num_classes: int | None = None,
    confidence: float = 0.7,
    ignore_label: int = 255,
    panel: PathLike | None = None,
    save_probs: PathLike | None = None,
    overwrite: bool = False,
    max_pixels: int = images.MAX_PIXELS,
    **crf: Any,
) -> Refined:
    """Refine the labels or the class probabilities of one picture and write the result as an indexed PNG.

    Args:
        image: the picture that guides the CRF, (H, W).
        output: the label map to write, ending in .png. All outputs are written, or none.
        probs: .npy file of floats, (L, H, W), or (H, W, L) where the sizes leave no doubt; they sum to 1 over L.
        labels: indexed or grey PNG, (H, W), in place of ``probs``.
        logits: the values in ``probs`` are logits.
        num_classes: the CRF chooses among the labels 0..num_classes - 1; by default among those that ``labels`` holds.
        confidence: probability, between 0 and 1, that a label in ``labels`` is right.
        ignore_label: pixels with this label are unknown, every label is equally likely there before the CRF.
        panel: .png to write: the image, the labels before, the labels after.
        save_probs: .npy to write: the marginals, float32 (L, H, W), channel = label.
        overwrite: replace outputs that exist. An input is never replaced.
        max_pixels: refuse larger pictures.
        crf: arguments of `crfnet.dense_crf` (theta_alpha=, num_iterations=, engine=, ...).

    Raises:
        FileExistsError: an output exists, or is an input.
        ValueError: a file has the wrong name, contents or size; the message names it.
        OSError: a file cannot be read or written.
    """
    start = time.perf_counter()
    source = probs if probs is not None else labels
    if source is None or (probs is not None and labels is not None):
        raise ValueError(f"give either probs or labels, got probs={probs!r} and labels={labels!r}")
    check_outputs([output, panel], [image, source], ".png", overwrite)
    check_outputs([save_probs], [image, source], ".npy", overwrite)
    if not os.path.exists(source):
        kind = "labels" if probs is None else "probabilities"
        raise FileNotFoundError(f"no {kind} for {image}: wanted {source}")
    picture = images.read_image(image, max_pixels=max_pixels)
    shape = picture.shape[:2]
    if probs is not None:
        unary = _read_scores(probs, shape, image, logits)
        if num_classes is not None and num_classes != len(unary):
            raise ValueError(f"{probs}: {len(unary)} classes, but num_classes is {num_classes}")
        before, known, classes = unary.argmax(0).numpy().astype(np.uint8), np.True_, np.arange(len(unary))
    else:
        before = images.read_labels(source, max_pixels=max_pixels)
        if before.shape != shape:
            raise ValueError(f"{labels} is {_size(before.shape)}, but {image} is {_size(shape)}")
        known = before != ignore_label
        if not known.any():
            raise ValueError(f"{labels}: every pixel has the ignored label {ignore_label}")
        classes = np.unique(before[known]) if num_classes is None else np.arange(num_classes)
        if before[known].max() > classes[-1]:
            raise ValueError(f"{labels}: has label {before[known].max()}, but num_classes is {num_classes}")
        index = np.where(known, np.searchsorted(classes, before), -1)
        unary = logits_from_labels(torch.from_numpy(index)[None], len(classes), confidence, ignore_index=-1)[0]

    guide = torch.from_numpy(picture).movedim(-1, 0)[None].float()
    q = dense_crf(guide, unary[None], **crf)[0].softmax(0)  # (L, H, W)
    after = classes[q.argmax(0).numpy()].astype(np.uint8)
    with ExitStack() as files:  # each gets its name when all are complete; the first, the label map, is the last to
        images.label_picture(after).save(files.enter_context(images.atomic_write(output)), "PNG")
        if panel is not None:
            views = [picture, images.overlay(picture, before), images.overlay(picture, after)]
            Image.fromarray(images.panel(views)).save(files.enter_context(images.atomic_write(panel)), "PNG")
        if save_probs is not None:
            marginals = np.zeros((classes[-1] + 1, *shape), np.float32)
            marginals[classes] = q.numpy()
            np.save(files.enter_context(images.atomic_write(save_probs)), marginals)
    changed = float((before != after)[known].mean())
    return Refined(shape[1], shape[0], len(np.unique(after)), changed, time.perf_counter() - start)


def check_outputs(outputs: Sequence[PathLike | None], inputs: Sequence[PathLike], suffix: str, overwrite: bool) -> None:
    """Refuse names that do not end in ``suffix``, that occur twice, that are an input, or that exist, before any work.

    Raises:
        ValueError: a wrong ending, or one name for two outputs.
        FileExistsError: the file is an input, or exists and ``overwrite`` is false.
    """
    kept = {_identity(path) for path in inputs if os.path.exists(path)}
    seen: set[str] = set()
    for path in outputs:
        if path is None:
            continue
        if not os.fspath(path).lower().endswith(suffix):
            raise ValueError(f"{path}: this output's name must end in {suffix}")
        if os.path.realpath(path) in seen:
            raise ValueError(f"{path}: two outputs would have this name")
        seen.add(os.path.realpath(path))
        if os.path.exists(path):
            if _identity(path) in kept:
                raise FileExistsError(f"{path}: is an input, which is never replaced; choose another output")
            if not overwrite:
                raise FileExistsError(f"{path}: exists; overwrite (--overwrite) would replace it")


def _identity(path: PathLike) -> tuple[int, int]:
    """What two names of one file share, whatever links or letter case lie between them."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _read_scores(path: PathLike, shape: tuple[int, ...], image: PathLike, logits: bool) -> Tensor:
    """Logits (L, H, W) from a .npy file of probabilities, or of logits, for a picture of ``shape`` (H, W)."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: sizes are checked before reading it all
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a whole .npy file of numbers ({error})") from error
    if not isinstance(stored, np.ndarray):
        stored.close()
        raise ValueError(f"{path}: an .npz archive; save the one array with numpy.save")
    if stored.ndim != 3 or stored.dtype.kind != "f":
        raise ValueError(f"{path}: {stored.dtype} of shape {stored.shape}; wanted floats (L, H, W)")
    if stored.shape[1:] != shape and stored.shape[:2] == shape:
        stored = np.moveaxis(stored, -1, 0)
    if stored.shape[1:] != shape:
        wanted = f"(L, {shape[0]}, {shape[1]})"
        raise ValueError(f"{path} is of shape {stored.shape}, but {image} is {_size(shape)}: wanted {wanted}")
    if not 1 <= len(stored) <= 256:
        raise ValueError(f"{path}: {len(stored)} classes; a label map holds 1 to 256")
    scores = np.array(stored, np.float32)
    low, high = scores.min(), scores.max()  # NaN where there is any
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{path}: values must be finite, got NaN or infinity")
    if logits:
        return torch.from_numpy(scores)
    hint = "if they are logits, say so (--logits)"
    if low < -SUM_TOLERANCE or high > 1 + SUM_TOLERANCE:
        raise ValueError(f"{path}: values {low:.4g}..{high:.4g} are no probabilities, which lie in 0..1; {hint}")
    off = np.abs(scores.sum(0) - 1).max()
    if off > SUM_TOLERANCE:
        raise ValueError(
            f"{path}: probabilities must sum to 1 over the classes, got sums off by up to {off:.3g}; {hint}"
        )
    return logits_from_probabilities(torch.from_numpy(scores.clip(0, 1))[None])[0]


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"
