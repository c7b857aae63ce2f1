"""Learning rates of the papers: which parameters learn how fast, and how that decays.

Factors of the learning rate and of the weight decay:

| parameters                  | lr_mult       | decay_mult   | source                                         |
| --------------------------- | ------------- | ------------ | ---------------------------------------------- |
| weights                     | 1             | 1            |                                                |
| biases                      | 2             | 0            | every Caffe prototxt (lr_mult 2, decay_mult 0) |
| biases of deconvolutions    | 1             | 0            | CRF-RNN's score2, which alone has one          |
| weights of the score layers | 10            | 1            | DeepLab v1 and v2; 1 in FCN                    |
| biases of the score layers  | 20            | 0            | likewise; 2 in FCN                             |
| batch norm, where it learns | 1             | 0            |                                                |
| the CRF's                   | its own       | 0 (ours)     | CRF-RNN: weights 1e4, compatibilities 1e3      |

    step   lr * gamma^floor(iteration / every)        (arXiv:1412.7062, section 5)
    poly   lr * (1 - iteration / total)^power         (arXiv:1606.00915, section 4.1.2)
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from crfnet.crf import DenseCRF
from crfnet.inputs import whole_number
from crfnet.models.heads import ASPP

Schedule = Callable[[int], float]  # iteration → what every learning rate is multiplied by
SCORES = {"score_fr", "score_pool4", "score_pool3", "fc8", "classifier"}


def parameter_groups(
    network: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 5e-4,
    bias_factor: float = 2.0,
    head_factor: float = 10.0,
    crf_weights: float | None = None,
    crf_compatibility: float | None = None,
    crf_bandwidths: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimiser, with every parameter that learns in exactly one, named for logs.

    Args:
        network: of `crfnet.models`, or any other; score layers are those of its names, and ASPP's branches.
        learning_rate: of the trunk's weights.
        weight_decay: of weights; biases, batch norm and the CRF have none.
        bias_factor: of biases, against their weights; those of deconvolutions learn as these do.
        head_factor: of score layers, against the trunk.
        crf_weights: learning rate of kernel weights; as the trunk's where it is None, and so the next two.
        crf_compatibility: learning rate of the compatibilities.
        crf_bandwidths: learning rate of the bandwidths, which are stored as logarithms.

    Raises:
        ValueError: nothing in the network learns.
    """
    crf = {"weight": crf_weights, "compatibility": crf_compatibility, "theta": crf_bandwidths}
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for kind, name, parameter in _parameters(network):
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        rate, decay = learning_rate, weight_decay
        if kind == "crf":
            kind = next(part for part in crf if part in name)
            chosen = crf[kind]
            rate, decay, kind = learning_rate if chosen is None else chosen, 0.0, f"crf {kind}"
        else:
            rate *= head_factor if kind == "head" else 1.0
            if name == "bias" and kind != "norm":
                rate *= bias_factor if kind != "deconvolution" else 1.0
                decay, kind = 0.0, f"{kind} biases"
            decay = 0.0 if kind == "norm" else decay
        group = groups.setdefault(kind, {"name": kind, "params": [], "lr": float(rate), "weight_decay": float(decay)})
        group["params"].append(parameter)
    if not groups:
        raise ValueError(f"network must have parameters that learn, got none in {type(network).__name__}")
    return list(groups.values())


def _parameters(network: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Kind (trunk, deconvolution, head, norm, crf), name within its module, and the parameter."""
    in_crf = {id(p) for module in network.modules() if isinstance(module, DenseCRF) for p in module.parameters()}
    branches = {id(branch) for module in network.modules() if isinstance(module, ASPP) for branch in module.branches}
    for path, module in network.named_modules():
        kind = "trunk"
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            kind = "norm"
        elif isinstance(module, nn.ConvTranspose2d):
            kind = "deconvolution"
        elif path.rsplit(".", 1)[-1] in SCORES or (id(module) in branches and isinstance(module, nn.Conv2d)):
            kind = "head"
        for name, parameter in module.named_parameters(recurse=False):
            yield "crf" if id(parameter) in in_crf else kind, name, parameter


def step_policy(every: int, gamma: float = 0.1) -> Schedule:
    """Caffe's "step": a factor ``gamma`` every so many iterations."""
    whole_number("every", every, 1)
    return lambda iteration: gamma ** (iteration // every)


def fixed_policy() -> Schedule:
    """Caffe's "fixed": the learning rate stays."""
    return lambda iteration: 1.0


def poly_policy(total: int, power: float = 0.9, *, warm_up: int = 0) -> Schedule:
    """Caffe's "poly", to zero at ``total`` iterations, after a linear ``warm_up``, which the papers have not."""
    whole_number("total", total, 1)
    whole_number("warm_up", warm_up, 0)

    def factor(iteration: int) -> float:
        rising = min((iteration + 1) / warm_up, 1.0) if warm_up else 1.0
        return float(rising * max(0.0, 1.0 - iteration / total) ** power)

    return factor


def scheduler(optimizer: Optimizer, schedule: Schedule) -> LambdaLR:
    """The schedule for all groups of an optimiser, stepped once an iteration."""
    return LambdaLR(optimizer, lambda iteration: float(schedule(iteration)))  # NumPy's would not load again
