"""Weights of networks from and to files: Caffe's, torchvision's, those of three ports to PyTorch, and our own."""

from crfnet.weights.files import read, want_safetensors
from crfnet.weights.loading import Report, load, save

__all__ = ["Report", "load", "read", "save", "want_safetensors"]
