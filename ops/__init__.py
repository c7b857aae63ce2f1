"""Message passing: the Gaussian filter over every pair of points, behind one door with several engines.

out_i = sum_j exp(-|f_i - f_j|² / 2) v_j
"""

if __name__ != "crfnet.ops":  # an op registered twice would replace the first in silence
    raise ImportError("import crfnet.ops; the folder ops/ is only its source")

from . import reference
from .filter import GaussianFilter, gaussian_filter
from .operator import METHODS
from .reference import NORMALIZATIONS
from .separable import GridFilter

__all__ = ["METHODS", "NORMALIZATIONS", "GaussianFilter", "GridFilter", "gaussian_filter", "reference"]
