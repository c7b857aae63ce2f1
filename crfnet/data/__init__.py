"""Data sets on disk as lists of image and label files, and the transforms applied to both alike."""

from crfnet.data.pairs import pairs_files
from crfnet.data.samples import VOID, Crop, Samples, image_sizes, read_sample
from crfnet.data.synthetic import write_voc
from crfnet.data.voc import voc_files

__all__ = ["VOID", "Crop", "Samples", "image_sizes", "pairs_files", "read_sample", "voc_files", "write_voc"]
