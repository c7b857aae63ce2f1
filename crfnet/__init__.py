"""Fully connected CRFs for segmentation: as a trainable layer, as a post-processor, as a command."""

from .crf import DenseCRF, Diagnostics, dense_crf
from .kernels import Kernel
from .unary import logits_from_labels, logits_from_probabilities

__version__ = "0.1.0"

__all__ = [
    "DenseCRF",
    "Diagnostics",
    "Kernel",
    "dense_crf",
    "logits_from_labels",
    "logits_from_probabilities",
]
