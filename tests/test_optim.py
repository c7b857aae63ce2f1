"""Schedules against values computed by hand, and who learns how fast in every network, against the papers' tables."""

import re

import numpy as np
import pytest
import torch
from slim import make
from torch import nn
from torch.nn import functional as F

from crfnet import DenseCRF, models
from crfnet.models import (
    ASPP,
    CRFRNN,
    Averaged,
    BackboneDeepLab,
    DeepLabV1,
    DeepLabV1MSc,
    DeepLabV2ResNet,
    DeepLabV2VGG,
    FCN8s,
    FCN16s,
    FCN32s,
    FCNAlexNet,
    FCNGoogLeNet,
    LargeFOV,
    LateFusionFCN,
    MultiScale,
    ResNet,
    SiftFlowFCN,
    SmallDeepLab,
    WithCRF,
)
from crfnet.optim import parameter_groups, poly_policy, scheduler, step_policy

LR, DECAY = 1e-3, 5e-4


@pytest.mark.parametrize(
    ("policy", "values"),
    [
        # DeepLab v1: 1e-3, a tenth every 2000 iterations, 6000 in all
        (step_policy(2000), {0: 1, 1999: 1, 2000: 0.1, 3999: 0.1, 4000: 0.01, 5999: 0.01}),
        (step_policy(3, 0.5), {2: 1, 3: 0.5, 8: 0.25}),
        # DeepLab v2: power 0.9 over 20000 iterations; 0.5^0.9 = exp(-0.9 ln 2), 0.1^0.9, (1 / 20000)^0.9
        (poly_policy(20_000), {0: 1, 10_000: 0.535887, 18_000: 0.125893, 19_999: 1.34609e-4, 20_000: 0, 20_001: 0}),
        (poly_policy(100, 1.0), {0: 1, 25: 0.75, 99: 0.01}),
        (poly_policy(100, 1.0, warm_up=4), {0: 0.25, 1: 0.5 * 0.99, 3: 0.97, 50: 0.5}),
    ],
)
def test_policies_by_hand(policy, values):
    for iteration, wanted in values.items():
        assert policy(iteration) == pytest.approx(wanted, rel=1e-5)


def test_every_iteration_has_its_own_rate_in_every_group():
    weight, bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 1e-2}, {"params": [bias], "lr": 2e-2}])
    steps, used = scheduler(optimizer, lambda iteration: np.float64(0.5) ** iteration), []
    for _ in range(3):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        steps.step()
    assert used == [[1e-2, 2e-2], [5e-3, 1e-2], [2.5e-3, 5e-3]]
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)  # NumPy's no checkpoint can hold


def test_wrong_schedules_say_what_is_wanted():
    with pytest.raises(ValueError, match="every"):
        step_policy(0)
    with pytest.raises(ValueError, match="total"):
        poly_policy(0)


# ---------------------------------------------------------------------------------------------------------------------
# parameter groups


class Backbone(nn.Module):
    """Stride 8, scores at every 8th pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 4, 1))

    def forward(self, x):
        return self.layers(x)


def frozen_msc() -> nn.Module:
    network = DeepLabV1MSc()
    network.base.requires_grad_(False)  # the released nets train the branches alone, at rates 1 and 2
    return network


SCORES = r"(^|\.)score_(fr|pool4|pool3)$"
FCNS = [
    FCN32s, FCN16s, FCN8s, FCNAlexNet, FCNGoogLeNet, LateFusionFCN, SiftFlowFCN,
    lambda: SiftFlowFCN(stride=8), lambda: LateFusionFCN(stride=8), lambda: FCN8s(at_once=True),
    lambda: FCN8s(learn_upsampling=True), lambda: FCNGoogLeNet(style="torchvision"),
    lambda: FCNAlexNet(style="torchvision"),
]  # fmt: skip
DEEPLABS = [
    *((lambda v=v: DeepLabV1(variant=v), r"^fc8$", 1) for v in ("largefov", "deeplab", "7x7", "4x4")),
    (frozen_msc, "nothing", 0),
    (DeepLabV1MSc, r"^base\.fc8$", 1),
    (DeepLabV2VGG, r"^head\.branches\.\d\.fc8$", 4),
    (lambda: DeepLabV2VGG(head="aspp-s"), r"^head\.branches\.\d\.fc8$", 4),
    (lambda: DeepLabV2VGG(head="largefov"), r"^head\.branches\.0\.fc8$", 1),
    (DeepLabV2ResNet, r"^head\.branches\.\d$", 4),
    (lambda: DeepLabV2ResNet(freeze_norm=False), r"^head\.branches\.\d$", 4),
    (lambda: DeepLabV2ResNet(head="largefov"), r"^head\.branches\.0$", 1),
    (lambda: MultiScale(DeepLabV2ResNet()), r"^network\.head\.branches\.\d$", 4),
    (lambda: MultiScale(DeepLabV2VGG()), r"^network\.head\.branches\.\d\.fc8$", 4),
    (lambda: BackboneDeepLab(Backbone(), 3), r"^head\.branches\.\d$", 4),
    (lambda: BackboneDeepLab(Backbone(), 3, head="largefov"), r"^head\.branches\.0$", 1),
    (lambda: ASPP(6, 3), r"^branches\.\d$", 4),
    (lambda: LargeFOV(6, 3, hidden=4), r"^branches\.0\.fc8$", 1),
    (lambda: SmallDeepLab(3, width=4), r"^classifier$", 1),
    (lambda: WithCRF(SmallDeepLab(3, width=4), DenseCRF(3)), r"^network\.classifier$", 1),
    (lambda: Averaged(SmallDeepLab(3, width=4)), r"^network\.classifier$", 1),
    (ResNet, "nothing", 0),
]


def learnt(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def settings_of(network: nn.Module, **settings) -> dict[str, tuple[float, float]]:
    """Rate / LR and decay of every parameter, which must each be in one group."""
    groups = parameter_groups(network, LR, weight_decay=DECAY, **settings)
    names = {id(p): name for name, p in network.named_parameters()}
    listed = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(learnt(network))  # each once, and none that is fixed
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.SGD(groups, momentum=0.9)
    return {names[id(p)]: (group["lr"] / LR, group["weight_decay"]) for group in groups for p in group["params"]}


def check(network: nn.Module, scores: str, count: int, head_factor: float) -> None:
    found = set()
    for name, (rate, decay) in settings_of(network, head_factor=head_factor).items():
        layer, kind = name.rpartition(".")[::2]
        if ".crf." in f".{name}" or layer == "crf":
            assert (rate, decay) == (1, 0), name
        elif isinstance(network.get_submodule(layer), nn.BatchNorm2d):
            assert (rate, decay) == (1, 0), name
        else:
            factor = head_factor if re.search(scores, layer) else 1
            found |= {layer} if re.search(scores, layer) else set()
            assert (pytest.approx(rate), decay) == ((factor, DECAY) if kind == "weight" else (2 * factor, 0)), name
    assert len(found) == count


@pytest.mark.parametrize("build", FCNS)
def test_fcn_learns_at_one_rate_with_doubled_biases(build):
    network = make(build)
    scores = sum(bool(re.search(SCORES, name)) for name, _ in network.named_modules())
    assert scores >= 1
    check(network, SCORES, scores, 1.0)
    check(network, SCORES, scores, 10.0)  # and who wants may have it otherwise


@pytest.mark.parametrize(("build", "scores", "count"), DEEPLABS)
def test_deeplab_learns_its_scores_ten_times_as_fast(build, scores, count):
    check(make(build), scores, count, 10.0)


def test_fixed_deconvolutions_and_frozen_norms_are_in_no_group():
    for build in (FCN8s, LateFusionFCN, SiftFlowFCN):
        assert not [name for name in settings_of(make(build)) if "upscore" in name]
    learning = settings_of(make(lambda: FCN8s(learn_upsampling=True)))
    assert {name for name in learning if "upscore" in name} == {
        f"head.{n}.weight" for n in ("upscore2", "upscore_pool4")
    }
    assert not [name for name in settings_of(make(DeepLabV2ResNet)) if ".bn." in name]
    assert all(name.startswith("branches.") for name in settings_of(make(frozen_msc)))


def test_every_network_of_the_package_is_in_these_tables():
    built = {type(module) for entry in [*FCNS, *(d[0] for d in DEEPLABS), CRFRNN] for module in make(entry).modules()}
    networks = {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert networks - built - {models.Preprocess, models.Tiled} == set()  # what has no parameters of its own


def test_crf_rnn_learns_weights_ten_thousand_and_compatibilities_a_thousand_times_as_fast():
    network = make(CRFRNN)
    rates = settings_of(network, head_factor=1.0, crf_weights=1e4 * LR, crf_compatibility=1e3 * LR)
    crf = {name: pytest.approx(value) for name, value in rates.items() if name.startswith("crf.")}
    assert crf == {
        "crf.kernels.spatial.weight": (1e4, 0),
        "crf.kernels.bilateral.weight": (1e4, 0),
        "crf.compatibility_matrix": (1e3, 0),
    }
    learnt = {name: rate for name, rate in rates.items() if "upscore" in name}
    assert learnt == {  # the prototxt has rate 1 for its one bias as well
        "network.head.upscore2.weight": (1, DECAY),
        "network.head.upscore2.bias": (1, 0),
        "network.head.upscore_pool4.weight": (1, DECAY),
    }
    assert (rates["network.head.score_fr.weight"], rates["network.head.score_fr.bias"]) == ((1, DECAY), (2, 0))


def test_a_crf_of_other_forms_has_its_groups_as_well():
    learn = ("weights", "compatibility", "bandwidths")
    crf = DenseCRF(3, weights="scalar", compatibility="per_class", learn=learn)
    rates = settings_of(crf, crf_weights=2 * LR, crf_compatibility=3 * LR, crf_bandwidths=4 * LR)
    wanted = {"log_weight": 2, "log_compatibility": 3, "log_theta_position": 4, "log_theta_guide": 4}
    assert {name: pytest.approx(rate) for name, (rate, _) in rates.items()} == {
        name: wanted[name.rpartition(".")[2]] for name in rates
    }
    assert len(rates) == 6 and not any(decay for _, decay in rates.values())


def test_shared_parameters_are_listed_once_and_nothing_to_learn_is_an_error():
    layer = nn.Conv2d(3, 3, 1)
    assert set(settings_of(nn.ModuleDict({"one": layer, "again": layer}))) == {"one.weight", "one.bias"}
    with pytest.raises(ValueError, match="parameters that learn, got none in ConvTranspose2d"):
        parameter_groups(models.fcn.deconvolution(3, 4, 2), LR)


def test_one_step_is_caffes():
    """V <- momentum V + rate (gradient + decay W), W <- W - V, with each parameter's own rate and decay."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "fc8": nn.Conv2d(2, 2, 1)}).double()
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    optimizer = torch.optim.SGD(parameter_groups(network, LR, weight_decay=DECAY), momentum=0.9)
    velocity, gradients = dict.fromkeys(start, 0.0), []
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(network["fc8"](network["conv"](x)), x).backward()
        gradients.append({name: p.grad.clone() for name, p in network.named_parameters()})
        optimizer.step()
    factors = {"conv.weight": (1, 1), "conv.bias": (2, 0), "fc8.weight": (10, 1), "fc8.bias": (20, 0)}
    for name, (rate, decay) in factors.items():
        value = start[name]
        for gradient in gradients:
            velocity[name] = 0.9 * velocity[name] + rate * LR * (gradient[name] + decay * DECAY * value)
            value = value - velocity[name]
        torch.testing.assert_close(network.get_parameter(name).detach(), value, rtol=1e-12, atol=1e-15)
