"""Data sets on disk as lists of image and label files, and the transforms applied to both alike.

| data set | files | label reader for ``Samples`` | classes |
| --- | --- | --- | --- |
| PASCAL VOC 2012, train_aug | ``voc_files`` | the default | 21 |
| SBD | ``sbd_files`` | ``sbd_labels`` | 21 |
| VOC 2012 with SBD, CRF-RNN's | ``crfrnn_files`` | ``voc_or_sbd_labels`` | 21 |
| PASCAL-Context | ``pascal_context_files`` | ``pascal_context_labels`` | 60 |
| PASCAL-Person-Part | ``person_part_files`` | ``person_part_labels`` | 7 |
| Cityscapes | ``cityscapes_files`` | ``cityscapes_labels`` | 19 |
| NYUDv2 | ``nyud_files`` | ``nyud_labels`` | 40 |
| SIFT Flow | ``siftflow_files`` | ``siftflow_labels``: two labellings | 33 and 3 |
| CamVid | ``camvid_files`` | ``camvid_labels`` | 11 |
| any folder with lists | ``pairs_files`` | the default | yours |
"""

from crfnet.data.camvid import (
    CAMVID_CLASSES,
    CAMVID_PALETTE,
    CAMVID_WEIGHTS,
    camvid_files,
    camvid_labels,
    median_frequency_weights,
)
from crfnet.data.cityscapes import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    cityscapes_files,
    cityscapes_frame,
    cityscapes_images,
    cityscapes_labels,
    write_cityscapes_result,
)
from crfnet.data.held_out import hold_out
from crfnet.data.nyud import NYUD_CLASSES, nyud_files, nyud_labels, read_colour_depth, read_colour_hha, read_hha
from crfnet.data.pairs import pairs_files
from crfnet.data.pascal_context import (
    PASCAL_CONTEXT_CLASSES,
    pascal_context_classes,
    pascal_context_files,
    pascal_context_labels,
)
from crfnet.data.person_part import (
    PERSON_PART_CLASSES,
    person_part_files,
    person_part_labels,
    write_person_part_lists,
)
from crfnet.data.samples import DEEPLAB_SCALES, VOID, Crop, Samples, image_sizes, read_sample
from crfnet.data.sbd import (
    crfrnn_files,
    sbd_files,
    sbd_labels,
    seg11valid_files,
    voc_or_sbd_labels,
    write_train_aug,
)
from crfnet.data.siftflow import SIFTFLOW_CLASSES, SIFTFLOW_GEOMETRIC, siftflow_files, siftflow_labels
from crfnet.data.synthetic import write_scenes
from crfnet.data.voc import VOC_CLASSES, voc_files, voc_images, write_voc_results

__all__ = [
    "CAMVID_CLASSES", "CAMVID_PALETTE", "CAMVID_WEIGHTS", "CITYSCAPES_CLASSES", "CITYSCAPES_PALETTE",
    "DEEPLAB_SCALES", "NYUD_CLASSES", "PASCAL_CONTEXT_CLASSES", "PERSON_PART_CLASSES", "SIFTFLOW_CLASSES",
    "SIFTFLOW_GEOMETRIC", "VOC_CLASSES", "VOID",
    "Crop", "Samples", "camvid_files", "camvid_labels", "cityscapes_files", "cityscapes_frame", "cityscapes_images",
    "cityscapes_labels", "crfrnn_files", "hold_out", "image_sizes", "median_frequency_weights", "nyud_files",
    "nyud_labels", "pairs_files", "pascal_context_classes", "pascal_context_files", "pascal_context_labels",
    "person_part_files", "person_part_labels", "read_colour_depth", "read_colour_hha", "read_hha", "read_sample",
    "sbd_files", "sbd_labels", "seg11valid_files", "siftflow_files", "siftflow_labels", "voc_files", "voc_images",
    "voc_or_sbd_labels", "write_cityscapes_result", "write_person_part_lists", "write_scenes", "write_train_aug",
    "write_voc_results",
]  # fmt: skip
