"""How the label maps of a data set are found, matched and read: what ``crfnet evaluate --dataset`` chooses.

| layout     | prediction and truth of an image                                               | labels              |
| ---------- | ------------------------------------------------------------------------------ | ------------------- |
| PLAIN      | files of one stem in two folders                                               | as they are         |
| CITYSCAPES | ``<frame>_labelIds.png``, ``<frame>_gtFine_labelIds.png``, by city or together | labelIds → trainIds |
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crfnet.batch import LABEL_MAPS, PICTURES, by_stem
from crfnet.data import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, cityscapes_frame, cityscapes_labels
from crfnet.data.cityscapes import CITYSCAPES_ENDINGS
from crfnet.images import Uint8, read_labels

IMAGE, TRUTH, RESULT = CITYSCAPES_ENDINGS


@dataclass(frozen=True)
class Layout:
    """Where the files of an image are, and what is in them."""

    name_of: Callable[[Path], str]  # what the files of an image share
    listed: Callable[[str], str]  # the same from a line of a split
    maps: Callable[[Path], dict[str, Path]]  # label maps of a folder, by these names
    photos: Callable[[Path], dict[str, Path]]  # likewise
    read: Callable[[Path], Uint8]  # labels (H, W)
    wanted: str  # what a folder of label maps has in it
    label: str = "label"  # what ``read`` gives, in messages
    names: tuple[str, ...] = ()  # of the classes, where the layout knows them
    palette: Uint8 | None = None


def _by_frame(folder: Path, *endings: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob(f"*{endings[0]}")):
        frame = cityscapes_frame(path, endings)
        if frame in found:
            raise ValueError(f"{found[frame]} and {path} are of one frame: which is meant?")
        found[frame] = path
    return found


PLAIN = Layout(
    name_of=lambda path: path.stem,
    listed=lambda name: name,
    maps=lambda folder: by_stem(folder, LABEL_MAPS),
    photos=lambda folder: by_stem(folder, PICTURES),
    read=read_labels,
    wanted=" ".join(LABEL_MAPS),
)
CITYSCAPES = Layout(
    name_of=cityscapes_frame,
    listed=lambda name: cityscapes_frame(Path(f"{name}.png"), (*CITYSCAPES_ENDINGS, ".png")),
    maps=lambda folder: _by_frame(folder, RESULT, TRUTH),
    photos=lambda folder: _by_frame(folder, IMAGE),
    read=cityscapes_labels,
    wanted=f"*{RESULT}",
    label="trainId",
    names=CITYSCAPES_CLASSES,
    palette=CITYSCAPES_PALETTE,
)
LAYOUTS = {"plain": PLAIN, "cityscapes": CITYSCAPES}
