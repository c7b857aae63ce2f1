"""The folder that a test server takes, from a predictor and the images of the test split.

    write_voc_test(predict, voc_images("VOCdevkit"), "submission")              then pack submission/results
    write_cityscapes_test(predict, cityscapes_images("cityscapes"), "submission")   then pack submission

Every image becomes one label map of its own size; a folder with maps of other images is refused, as they would be
submitted with it. ``check_voc_test`` and ``check_cityscapes_test`` say so before anything is trained for it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from crfnet.data.cityscapes import CITYSCAPES_CLASSES, cityscapes_result_name, write_cityscapes_result
from crfnet.data.samples import read_rgb
from crfnet.data.voc import RESULTS, VOC_CLASSES, write_voc_results
from crfnet.evaluation import Predictor
from crfnet.images import PathLike


def write_voc_test(
    predict: Predictor,
    images: Sequence[PathLike],
    folder: PathLike,
    *,
    year: int = 2012,
    device: str | torch.device = "cpu",
) -> list[Path]:
    """Writes ``folder/results/VOC2012/Segmentation/comp6_test_cls/<image_id>.png`` for every image.

    Args:
        predict: from an image (1, 3, H, W) to logits (1, 21, H, W).
        images: files, their stems the image ids: ``crfnet.data.voc_images(root, "test")``.
        folder: made if missing; maps of these images in it are replaced.
        year: of the challenge.
        device: where the predictor works.

    Returns:
        The files written, in order.

    Raises:
        ValueError: no image, one id twice, maps of other images in the folder, or logits of another shape,
            with NaN or without a finite one in a pixel.
        OSError: the folder cannot be made or written.
    """
    check_voc_test(images, folder, year=year)
    return [
        write_voc_results(folder, path.stem, _labels(predict, path, len(VOC_CLASSES), device), year=year)
        for path in map(Path, images)
    ]


def check_voc_test(images: Sequence[PathLike], folder: PathLike, *, year: int = 2012) -> None:
    """Raises what `write_voc_test` would, for its images and its folder."""
    _check(Path(folder) / RESULTS.format(year=year), [f"{Path(image).stem}.png" for image in images])


def write_cityscapes_test(
    predict: Predictor, images: Sequence[PathLike], folder: PathLike, *, device: str | torch.device = "cpu"
) -> list[Path]:
    """Writes ``folder/<city>_<seq>_<frame>_labelIds.png`` for every image, labelIds as the server wants them.

    Args:
        predict: from an image (1, 3, H, W) to logits (1, 19, H, W), channels in the order of the trainIds.
        images: files ``*_leftImg8bit.png``: ``crfnet.data.cityscapes_images(root, "test")``.
        folder: made if missing; maps of these images in it are replaced.
        device: where the predictor works.

    Returns:
        The files written, in order.

    Raises:
        ValueError: no image, one twice, another name, maps of other images in the folder, or logits of another shape,
            with NaN or without a finite one in a pixel.
        OSError: the folder cannot be made or written.
    """
    check_cityscapes_test(images, folder)
    return [
        write_cityscapes_result(folder, path, _labels(predict, path, len(CITYSCAPES_CLASSES), device))
        for path in map(Path, images)
    ]


def check_cityscapes_test(images: Sequence[PathLike], folder: PathLike) -> None:
    """Raises what `write_cityscapes_test` would, for its images and its folder."""
    _check(Path(folder), [cityscapes_result_name(Path(image)) for image in images])


def _check(folder: Path, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"images must be at least one, got none to write into {folder}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"images must have names of their own, got several for {', '.join(twice[:5])}")
    strange = sorted({path.name for path in folder.glob("*.png")} - set(names))
    if strange:
        raise ValueError(
            f"{folder} holds {len(strange)} label maps of other images, the first {strange[0]}: "
            "remove them, or choose another folder"
        )
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be made or written, as {there} is a file or not ours to write")


@torch.no_grad()
def _labels(predict: Predictor, path: Path, num_classes: int, device: str | torch.device) -> Tensor:
    image = torch.from_numpy(read_rgb(path)).float()
    logits = predict(image[None].to(device))
    wanted = (1, num_classes, *image.shape[1:])
    if logits.shape != wanted:
        raise ValueError(f"{path}: the predictor must return logits {wanted}, got {tuple(logits.shape)}")
    if bool(logits.isnan().any()) or not bool(logits.amax(1).isfinite().all()):
        raise ValueError(f"{path}: the predictor must return a finite logit in every pixel, and no NaN")
    return logits.argmax(1)[0].cpu()
