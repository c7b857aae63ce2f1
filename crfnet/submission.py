"""The folder that a test server takes, from a predictor and the images of the test split.

    write_voc_test(predict, voc_images("VOCdevkit"), "submission")              then pack submission/results
    write_cityscapes_test(predict, cityscapes_images("cityscapes"), "submission")   then pack submission

Every image becomes one label map of its own size; a folder with maps of other images is refused, as they would be
submitted with it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from crfnet.data.cityscapes import submission_name, write_submission
from crfnet.data.samples import read_rgb
from crfnet.data.voc import RESULTS, write_voc_results
from crfnet.evaluation import Predictor

PathLike = str | os.PathLike[str]


def write_voc_test(
    predict: Predictor, images: Sequence[PathLike], folder: PathLike, *, device: str | torch.device = "cpu"
) -> list[Path]:
    """Writes ``folder/results/VOC2012/Segmentation/comp6_test_cls/<image_id>.png`` for every image.

    Args:
        predict: from an image (1, 3, H, W) to logits (1, 21, H, W).
        images: files, their stems the image ids: ``crfnet.data.voc_images(root, "test")``.
        folder: made if missing; maps of these images in it are replaced.
        device: where the predictor works.

    Returns:
        The files written, in order.

    Raises:
        ValueError: no image, one id twice, maps of other images in the folder, or logits of another shape.
    """
    paths = [Path(image) for image in images]
    _want_fresh(Path(folder) / RESULTS, [f"{path.stem}.png" for path in paths])
    return [write_voc_results(folder, path.stem, _labels(predict, path, device)) for path in paths]


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
        ValueError: no image, one twice, another name, maps of other images in the folder, or logits of another shape.
    """
    paths = [Path(image) for image in images]
    _want_fresh(Path(folder), [submission_name(path) for path in paths])
    return [write_submission(folder, path, _labels(predict, path, device)) for path in paths]


def _want_fresh(folder: Path, names: Sequence[str]) -> None:
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


@torch.no_grad()
def _labels(predict: Predictor, path: Path, device: str | torch.device) -> Tensor:
    image = torch.from_numpy(read_rgb(path)).float()
    logits = predict(image[None].to(device))
    if logits.ndim != 4 or logits.shape[0] != 1 or logits.shape[2:] != image.shape[1:]:
        wanted = (1, "L", *image.shape[1:])
        raise ValueError(f"{path}: the predictor must return logits {wanted}, got {tuple(logits.shape)}")
    if bool(logits.isnan().any()):
        raise ValueError(f"{path}: the predictor returned NaN")
    return logits.argmax(1)[0].cpu()
