"""What weights do not say of the network they are of: strides, holes, pools, scales, the CRF's form, by module.

Networks may have parameters of the same names and shapes and yet compute something else, as DeepLab's ASPP-S and ASPP-L
do. Our own files hold this beside the weights, so that one is not taken for another.
"""

import json
from typing import Any

from torch import nn

SETTINGS = (
    "kernel_size", "stride", "padding", "dilation", "groups", "ceil_mode", "count_include_pad", "eps", "size", "alpha",
    "beta", "offset", "scale3", "scale4", "logarithm", "end", "normalization", "remove_self", "image_range", "damping",
)  # fmt: skip
Structure = dict[str, dict[str, Any]]


def structure(network: nn.Module) -> Structure:
    """Name of a module → its settings, for all that have some."""
    found = {}
    for name, module in network.named_modules():
        settings = {key: getattr(module, key) for key in SETTINGS if isinstance(getattr(module, key, None), _PLAIN)}
        if settings:
            found[name] = json.loads(json.dumps(settings))  # tuples become lists, as they will be in a file
    return found


_PLAIN = (bool, int, float, str, tuple)


def differences(file: Structure, network: Structure, most: int = 6) -> list[str]:
    """What is otherwise in the network than in the file, in words."""
    texts = []
    for name in sorted(set(file) | set(network)):
        theirs, ours = file.get(name, {}), network.get(name, {})
        for key in sorted(set(theirs) | set(ours)):
            if theirs.get(key) != ours.get(key):
                texts.append(f"{name}.{key} {theirs.get(key)} in the file, {ours.get(key)} in the network")
    return texts[:most] + ([f"and {len(texts) - most} more"] if len(texts) > most else [])
