"""Networks of other people, from arrays under the names that their files give them: what `crfnet.weights` is judged by.

Nothing of crfnet is used. Names, shapes and geometry are those of the released prototxts and of the ports' sources; a
network is a function of its arrays, layer by layer, and of an image that is preprocessed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Arrays = dict[str, list[Tensor]]  # layer → its tensors, in Caffe's order


class Blob(NamedTuple):
    """How to draw a tensor; without ``std`` as He does for the layer before a ReLU, times ``gain``."""

    shape: tuple[int, ...]
    gain: float = 1.0
    std: float | None = None
    mean: float = 0.0


Table = dict[str, list[Blob]]
RAW = 1 / 60  # gain of a first layer that sees 0..255


def conv(out: int, inputs: int, kernel: int, *, bias: bool = True, gain: float = 1.0) -> list[Blob]:
    return [Blob((out, inputs, kernel, kernel), gain), *([Blob((out,), std=0.2)] if bias else [])]


def deconv(labels: int, kernel: int, *, bias: bool = False) -> list[Blob]:  # four of its taps meet at a pixel
    weight = Blob((labels, labels, kernel, kernel), std=(4 * labels) ** -0.5)
    return [weight, *([Blob((labels,), std=0.2)] if bias else [])]


def norm(channels: int, gain: float = 1.0) -> list[Blob]:
    """PyTorch's batch norm: weight, bias, mean, variance."""
    numbers = ((gain, 0.2 * gain), (0.0, 0.2), (0.0, 0.2), (1.2, 0.2))
    return [Blob((channels,), std=std, mean=mean) for mean, std in numbers]


def draw(table: Table, *, divisor: int = 1, seed: int = 0) -> Arrays:
    """Random arrays; ``divisor`` as in tests/slim.py, which does the same to our networks."""
    generator = torch.Generator().manual_seed(seed)

    def one(blob: Blob) -> Tensor:
        shape = [n if n <= 6 or axis > 1 else n // divisor for axis, n in enumerate(blob.shape)]
        tensor = torch.randn(shape, generator=generator)
        std = blob.gain * (2 * shape[0] / tensor.numel()) ** 0.5 if blob.std is None else blob.std
        return tensor.mul_(std).add_(blob.mean)

    return {layer: [one(blob) for blob in blobs] for layer, blobs in table.items()}


# files


def caffe_layers(arrays: Arrays) -> list[tuple[str, str, list]]:
    """As tests/caffe_writer.py wants them."""
    return [(layer, "Convolution", [blob.numpy() for blob in blobs]) for layer, blobs in arrays.items()]


def caffe_names(arrays: Arrays) -> dict[str, Tensor]:
    return {f"{layer}.{index}": blob for layer, blobs in arrays.items() for index, blob in enumerate(blobs)}


def torch_names(arrays: Arrays, prefix: str = "") -> dict[str, Tensor]:
    parts = ("weight", "bias", "running_mean", "running_var")
    state = {}
    for layer, blobs in arrays.items():
        state |= {f"{prefix}{layer}.{part}": blob for part, blob in zip(parts, blobs, strict=False)}
        if len(blobs) == 4:
            state[f"{prefix}{layer}.num_batches_tracked"] = torch.tensor(7)
    return state


# layers


def bgr(image: Tensor, *mean: float) -> Tensor:
    """RGB in 0..255 → BGR less a mean that is given in that order."""
    return image.flip(1) - torch.tensor(mean).view(3, 1, 1)


def imagenet(image: Tensor) -> Tensor:
    """RGB in 0..255 → what torchvision's networks take."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def interp(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=True)


def zoom(x: Tensor, factor: int) -> Tensor:
    return interp(x, (x.shape[2] - 1) * factor + 1, (x.shape[3] - 1) * factor + 1)


def crop(x: Tensor, offset: int, like: Tensor) -> Tensor:
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


class Net:
    """Arrays, and the layers that take them by name."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def conv(self, x: Tensor, name: str, pad: int = 0, *, stride: int = 1, hole: int = 1, groups: int = 1) -> Tensor:
        weight, bias, *_ = *self.arrays[name], None
        return F.conv2d(x, weight, bias, stride, pad, hole, groups)

    def relu(self, x: Tensor, name: str, pad: int = 0, **geometry: int) -> Tensor:
        return self.conv(x, name, pad, **geometry).relu()

    def deconv(self, x: Tensor, name: str, stride: int) -> Tensor:
        weight, bias, *_ = *self.arrays[name], None
        return F.conv_transpose2d(x, weight, bias, stride)

    def norm(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        weight, bias, mean, variance = (blob.view(-1, 1, 1) for blob in self.arrays[name])
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    def fully(self, x: Tensor, name: str, kernel: int) -> Tensor:
        """An inner product at every place of a window, its inputs in the order channel, row, column."""
        weight, bias = self.arrays[name]
        columns = F.unfold(x, kernel)  # (B, C kernel², places)
        y = weight.reshape(len(weight), -1) @ columns + bias.reshape(-1, 1)
        return y.view(len(x), -1, x.shape[2] - kernel + 1, x.shape[3] - kernel + 1).relu()


# VGG-16 and what stands on it

VGG = (
    ("conv1_1", 64, 3), ("conv1_2", 64, 64),
    ("conv2_1", 128, 64), ("conv2_2", 128, 128),
    ("conv3_1", 256, 128), ("conv3_2", 256, 256), ("conv3_3", 256, 256),
    ("conv4_1", 512, 256), ("conv4_2", 512, 512), ("conv4_3", 512, 512),
    ("conv5_1", 512, 512), ("conv5_2", 512, 512), ("conv5_3", 512, 512),
)  # fmt: skip
TORCHVISION_VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg_table(suffix: str = "", *, first: str = "conv1_1", channels: int = 3) -> Table:
    table = {f"{name}{suffix}": conv(out, inputs, 3) for name, out, inputs in VGG[1:]}
    return {f"{first}{suffix}": conv(64, channels, 3, gain=RAW), **table}


def fully_table(suffix: str = "", *, channels: int = 4096, kernel: int = 7) -> Table:
    return {f"fc6{suffix}": conv(channels, 512, kernel), f"fc7{suffix}": conv(channels, channels, 1)}


def vgg(
    net: Net,
    x: Tensor,
    pool: Callable[[Tensor, int], Tensor],
    *,
    names: Sequence[str] = tuple(name for name, _, _ in VGG),
    pad: int = 1,
    hole: int = 1,
) -> list[Tensor]:
    """pool1 to pool5; ``pad`` of conv1_1, ``hole`` of conv5."""
    pools = []
    for index, (name, (plain, _, _)) in enumerate(zip(names, VGG, strict=True)):
        wide = hole if plain.startswith("conv5") else 1
        x = net.relu(x, name, pad if index == 0 else wide, hole=wide)
        if index == len(VGG) - 1 or VGG[index + 1][0].endswith("_1"):
            x = pool(x, int(plain[4]))
            pools.append(x)
    return pools


def fcn_pool(x: Tensor, stage: int) -> Tensor:
    return F.max_pool2d(x, 2, 2, ceil_mode=True)


def fcn_trunk(net: Net, x: Tensor, suffix: str = "", *, first: str = "conv1_1") -> tuple[Tensor, Tensor, Tensor]:
    names = [f"{name}{suffix}" for name in (first, *(name for name, _, _ in VGG[1:]))]
    _, _, pool3, pool4, pool5 = vgg(net, x, fcn_pool, names=names, pad=100)
    return pool3, pool4, net.relu(net.relu(pool5, f"fc6{suffix}"), f"fc7{suffix}")


def classifier_trunk(net: Net, x: Tensor) -> Tensor:
    """fc7 of Caffe's classification network, its inner products at every place."""
    pool5 = vgg(net, x, fcn_pool, pad=100)[-1]
    return net.fully(net.fully(pool5, "fc6", 7), "fc7", 1)


def torchvision_vgg(net: Net, x: Tensor) -> Tensor:
    pool5 = vgg(net, x, fcn_pool, names=[f"features.{number}" for number in TORCHVISION_VGG], pad=100)[-1]
    return net.fully(net.fully(pool5, "classifier.0", 7), "classifier.3", 1)


def torchvision_vgg_table(gain: float = 1.0) -> Table:
    numbers = zip(TORCHVISION_VGG, VGG, strict=True)
    table = {f"features.{number}": conv(out, inputs, 3) for number, (_, out, inputs) in numbers}
    table["features.0"] = conv(64, 3, 3, gain=gain)
    return table | {"classifier.0": conv(4096, 512, 7), "classifier.3": conv(4096, 4096, 1)}


def flat(arrays: Arrays, *layers: str, four: bool = False) -> Arrays:
    """Convolutions of these layers as inner products, (O, I), or as Caffe had them before 2014: (1, 1, O, I)."""

    def one(blob: Tensor) -> Tensor:
        plain = blob.flatten(1) if blob.ndim > 1 else blob
        return plain[(None,) * (4 - plain.ndim)] if four else plain

    return arrays | {layer: [one(blob) for blob in arrays[layer]] for layer in layers}


# FCN

_PLAIN = {name: name for name in ("score_fr", "upscore2", "score_pool4", "upscore_pool4", "score_pool3", "upscore8")}
_CRF_RNN = dict(zip(_PLAIN, ("score-fr", "score2", "score-pool4", "score4", "score-pool3", "upsample"), strict=True))


def fcn_table(labels: int, stride: int, suffix: str = "", *, at_once: bool = False) -> Table:
    table = {"score_fr": conv(labels, 4096, 1)}
    if stride == 32:
        table["upscore"] = deconv(labels, 64)
    if stride <= 16:
        table |= {"upscore2": deconv(labels, 4), "score_pool4": conv(labels, 512, 1, gain=100 if at_once else 1)}
    if stride == 16:
        table["upscore16"] = deconv(labels, 32)
    if stride == 8:
        table |= {"upscore_pool4": deconv(labels, 4), "upscore8": deconv(labels, 16)}
        table["score_pool3"] = conv(labels, 256, 1, gain=10000 if at_once else 1)
    if at_once:
        table |= {"scale_pool4": [Blob((512,), std=0, mean=0.01)], "scale_pool3": [Blob((256,), std=0, mean=0.0001)]}
    return {f"{layer}{suffix}": blobs for layer, blobs in table.items()}


def fcn(net: Net, x: Tensor, stride: int, suffix: str = "", *, first: str = "conv1_1") -> Tensor:
    return fcn_head(net, fcn_trunk(net, x, first=first), x, stride, suffix)


def fcn_head(net: Net, features: Sequence[Tensor], image: Tensor, stride: int, suffix: str = "") -> Tensor:
    if stride == 8:
        return fcn8s_head(net, features, image, {name: f"{name}{suffix}" for name in _PLAIN})
    _, pool4, fc7 = features
    score = net.conv(fc7, f"score_fr{suffix}")
    if stride == 32:
        return crop(net.deconv(score, f"upscore{suffix}", 32), 19, image)
    up = net.deconv(score, f"upscore2{suffix}", 2)
    fuse = up + crop(net.conv(pool4, f"score_pool4{suffix}"), 5, up)
    return crop(net.deconv(fuse, f"upscore16{suffix}", 16), 27, image)


def fcn8s_head(net: Net, features: Sequence[Tensor], image: Tensor, names: Mapping[str, str] = _PLAIN) -> Tensor:
    pool3, pool4, fc7 = features
    if "scale_pool4" in net.arrays:
        pool4 = pool4 * net.arrays["scale_pool4"][0].view(-1, 1, 1)
        pool3 = pool3 * net.arrays["scale_pool3"][0].view(-1, 1, 1)
    up = net.deconv(net.conv(fc7, names["score_fr"]), names["upscore2"], 2)
    up = net.deconv(up + crop(net.conv(pool4, names["score_pool4"]), 5, up), names["upscore_pool4"], 2)
    fuse = up + crop(net.conv(pool3, names["score_pool3"]), 9, up)
    return crop(net.deconv(fuse, names["upscore8"], 8), 31, image)


def late_fusion(net: Net, color: Tensor, hha: Tensor) -> Tensor:
    scores = [
        net.conv(fcn_trunk(net, x, suffix)[2], f"score_fr{suffix}") for x, suffix in ((color, "color"), (hha, "hha"))
    ]
    return crop(net.deconv(0.5 * scores[0] + 0.5 * scores[1], "upscore", 32), 19, color)


def late_fusion_table(labels: int) -> Table:
    table: Table = {}
    for suffix in ("color", "hha"):
        table |= vgg_table(suffix) | fully_table(suffix) | {f"score_fr{suffix}": conv(labels, 4096, 1)}
    return table | {"upscore": deconv(labels, 64)}


# CRF-RNN


def crf_rnn_table(labels: int) -> Table:
    """Caffe's; the matrices are (1, 1, C, C)."""
    table = fcn_table(labels, 8) | {"upscore2": deconv(labels, 4, bias=True)}
    matrices = [Blob((1, 1, labels, labels), std=0.7) for _ in range(3)]
    return vgg_table() | fully_table() | {_CRF_RNN[layer]: table[layer] for layer in table} | {"inference1": matrices}


def sadeepj_names(arrays: Arrays) -> dict[str, Tensor]:
    """The port's state dict, 43 tensors; its matrices are (C, C)."""
    back = {theirs: ours for ours, theirs in _CRF_RNN.items()}
    plain = {back.get(layer, layer): blobs for layer, blobs in arrays.items() if layer != "inference1"}
    names = ("spatial_ker_weights", "bilateral_ker_weights", "compatibility_matrix")
    return torch_names(plain) | {
        f"crfrnn.{name}": blob[0, 0] for name, blob in zip(names, arrays["inference1"], strict=True)
    }


def crf_rnn(net: Net, x: Tensor, *, sign: int, iterations: int) -> Tensor:
    """Logarithms of the marginals; ``sign`` -1 as in Caffe, 1 as in the port. ``x`` is what network and CRF see."""
    logits = fcn8s_head(net, fcn_trunk(net, x), x, _CRF_RNN)
    matrices = [blob[0, 0].double() for blob in net.arrays["inference1"]]
    return (
        mean_field(logits[0].double(), x[0].double(), *matrices, sign=sign, iterations=iterations)
        .log_softmax(0)
        .float()[None]
    )


def mean_field(
    unary: Tensor,  # (C, H, W)
    image: Tensor,  # (3, H, W)
    spatial: Tensor,  # (C, C), as all three from the left
    bilateral: Tensor,
    compatibility: Tensor,
    *,
    sign: int,
    iterations: int,
) -> Tensor:
    """multi_stage_meanfield.cpp, and crfrnn.py for sign 1, with the (N, N) kernels stored in full."""
    C, H, W = unary.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    position = torch.stack([x, y]).flatten(1).to(unary)
    features = (position / 3, torch.cat([position / 160, image.flatten(1) / 3]))
    kernels = [torch.exp(-0.5 * torch.cdist(f.T, f.T).square()) for f in features]
    kernels = [kernel / kernel.sum(1) for kernel in kernels]  # columns of senders; symmetric before it
    unary = unary.flatten(1)
    current = unary
    for _ in range(iterations):
        q = current.softmax(0)
        messages = [q @ kernel for kernel in kernels]  # each receiver's own norm, after the filter
        current = unary + sign * (compatibility @ (spatial @ messages[0] + bilateral @ messages[1]))
    return current.view(C, H, W)


# DeepLab


def large_pool(x: Tensor, stage: int) -> Tensor:
    return F.max_pool2d(x, 3, 2 if stage <= 3 else 1, 1, ceil_mode=True)


def small_pool(x: Tensor, stage: int) -> Tensor:
    return large_pool(x, 5) if stage == 5 else F.max_pool2d(x, 2, 2 if stage <= 3 else 1, 1, ceil_mode=True)


def deeplab_table(labels: int, name: str = "fc8_voc12", *, channels: int = 1024, kernel: int = 3) -> Table:
    return vgg_table() | fully_table(channels=channels, kernel=kernel) | {name: conv(labels, channels, 1)}


def largefov(net: Net, x: Tensor, name: str = "fc8_voc12") -> Tensor:
    return zoom(largefov_scores(net, vgg(net, x, large_pool, hole=2)[-1], name), 8)


def largefov_scores(net: Net, pool5: Tensor, name: str) -> Tensor:
    pool5a = F.avg_pool2d(pool5, 3, 1, 1)
    return net.conv(net.relu(net.relu(pool5a, "fc6", 12, hole=12), "fc7"), name)


def deeplab(net: Net, x: Tensor, name: str) -> Tensor:
    """Of 8 k + 2 pixels."""
    pool5 = vgg(net, x, small_pool, hole=2)[-1]
    score = net.conv(net.relu(net.relu(pool5, "fc6", 6, hole=4), "fc7"), name)
    return zoom(score, 8)[:, :, 7:-8, 7:-8]


_BRANCHES = {"data": 3, "pool1": 64, "pool2": 128, "pool3": 256, "pool4": 512}


def msc_table(labels: int) -> Table:
    table = deeplab_table(labels)
    for source, channels in _BRANCHES.items():
        gain = RAW if source == "data" else 1.0
        table |= {f"{source}_conv": conv(128, channels, 3, gain=gain), f"{source}_fc": conv(128, 128, 1)}
        table |= {f"{source}_ms": conv(labels, 128, 1)}
    return table


def msc_largefov(net: Net, x: Tensor) -> Tensor:
    """The test network: branches at stride 1, each enlarged, then the sum."""
    pools = vgg(net, x, large_pool, hole=2)
    total = zoom(largefov_scores(net, pools[-1], "fc8_voc12"), 8)
    for source, features, factor in zip(_BRANCHES, (x, *pools[:4]), (1, 2, 4, 8, 8), strict=True):
        hidden = net.relu(net.relu(features, f"{source}_conv", 1), f"{source}_fc")
        total = total + zoom(net.conv(hidden, f"{source}_ms"), factor)
    return total


def aspp_table(labels: int, experiment: str = "voc12") -> Table:
    table = vgg_table()
    for k in (1, 2, 3, 4):
        table |= {f"fc6_{k}": conv(1024, 512, 3), f"fc7_{k}": conv(1024, 1024, 1)}
        table |= {f"fc8_{experiment}_{k}": conv(labels, 1024, 1)}
    return table


def aspp(net: Net, x: Tensor, experiment: str = "voc12") -> Tensor:
    pool5 = vgg(net, x, large_pool, hole=2)[-1]
    total = torch.zeros(())
    for k, rate in zip((1, 2, 3, 4), (6, 12, 18, 24), strict=True):
        hidden = net.relu(net.relu(pool5, f"fc6_{k}", rate, hole=rate), f"fc7_{k}")
        total = total + net.conv(hidden, f"fc8_{experiment}_{k}")
    return zoom(total, 8)


# ResNet-101

BLOCKS = {2: 3, 3: 4, 4: 23, 5: 3}
RATES = (6, 12, 18, 24)


def _caffe_block(stage: int, index: int) -> str:
    if stage in (2, 5):
        return f"{stage}{'abc'[index]}"
    return f"{stage}b{index}" if index else f"{stage}a"


def units() -> Iterable[tuple[int, int, str, int, int, int]]:
    """stage, block, part, outputs, inputs and kernel of every convolution after the first."""
    for stage, count in BLOCKS.items():
        width = 64 * 2**stage
        for index in range(count):
            inputs = width if index else max(64, width // 2) if stage > 2 else 64
            yield stage, index, "reduce", width // 4, inputs, 1
            yield stage, index, "conv3x3", width // 4, width // 4, 3
            yield stage, index, "increase", width, width // 4, 1
            if not index:
                yield stage, index, "shortcut", width, inputs, 1


def _unit(stage: int, index: int, part: str, style: str) -> tuple[str, str]:
    """Names of a convolution and of its norm, for Caffe without res or bn in front."""
    if style == "caffe":
        branch = {"reduce": "2a", "conv3x3": "2b", "increase": "2c", "shortcut": "1"}[part]
        name = f"{_caffe_block(stage, index)}_branch{branch}"
        return f"res{name}", f"bn{name}"
    if style == "torchvision":
        number = {"reduce": "1", "conv3x3": "2", "increase": "3"}.get(part)
        block = f"layer{stage - 1}.{index}."
        return (
            (block + f"conv{number}", block + f"bn{number}")
            if number
            else (block + "downsample.0", block + "downsample.1")
        )
    part = "proj" if part == "shortcut" and style == "old" else part
    return f"layer{stage}.block{index + 1}.{part}.conv", f"layer{stage}.block{index + 1}.{part}.bn"


_STEMS = {
    "caffe": ("conv1", "bn_conv1"),
    "torchvision": ("conv1", "bn1"),
    "kazuto1011": ("layer1.conv1.conv", "layer1.conv1.bn"),
    "old": ("layer1.conv1.conv", "layer1.conv1.bn"),
}


def resnet_table(style: str, *, raw: bool = True) -> Table:
    stem, stem_norm = _STEMS[style]
    table = {stem: conv(64, 3, 7, bias=False, gain=RAW if raw else 1.0), stem_norm: norm(64)}
    for stage, index, part, out, inputs, kernel in units():
        name, its_norm = _unit(stage, index, part, style)
        table |= {name: conv(out, inputs, kernel, bias=False), its_norm: norm(out, 0.3 if part == "increase" else 1.0)}
    return table


def resnet(net: Net, x: Tensor, style: str) -> Tensor:
    """Stride 8; the strides of res4 and res5 are holes."""
    there = style == "torchvision"  # stride on the 3x3, and the first block of a stage sees the holes of the one before
    stem, stem_norm = _STEMS[style]
    x = net.norm(net.conv(x, stem, 3, stride=2), stem_norm).relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=not there)
    previous = 1
    for stage, count in BLOCKS.items():
        hole = {2: 1, 3: 1, 4: 2, 5: 4}[stage]
        for index in range(count):
            stride = 2 if (stage, index) == (3, 0) else 1
            now = previous if there and index == 0 else hole

            def part(x: Tensor, what: str, stage=stage, index=index, **geometry: int) -> Tensor:
                name, its_norm = _unit(stage, index, what, style)
                return net.norm(net.conv(x, name, **geometry), its_norm)

            y = part(x, "reduce", stride=1 if there else stride).relu()
            y = part(y, "conv3x3", pad=now, hole=now, stride=stride if there else 1).relu()
            y = part(y, "increase")
            x = (y + (x if index else part(x, "shortcut", stride=stride))).relu()
        previous = hole
    return x


def resnet_head(net: Net, x: Tensor, names: Sequence[str]) -> Tensor:
    scores = [net.conv(x, name, rate, hole=rate) for name, rate in zip(names, RATES, strict=True)]
    return scores[0] + scores[1] + scores[2] + scores[3]


def resnet_head_table(labels: int, names: Iterable[str]) -> Table:
    return {name: conv(labels, 2048, 3) for name in names}


def multi_scale(scores: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The three scales of the released prototxt, for 32 k + 1 pixels: shrink 4 and zoom 3, shrink 2."""
    full, H, W = scores(x), x.shape[2] - 1, x.shape[3] - 1
    h, w = full.shape[2:]
    three_quarters = scores(interp(x, H // 4 * 3 + 1, W // 4 * 3 + 1))
    half = scores(interp(x, H // 2 + 1, W // 2 + 1))
    return zoom(torch.stack([full, interp(three_quarters, h, w), interp(half, h, w)]).amax(0), 8)


def caffe_norms(arrays: Arrays, factor: float = 2.5) -> Arrays:
    """Each norm as Caffe has it: BatchNorm with mean, variance and the factor in both, and Scale."""
    file: Arrays = {}
    for layer, blobs in arrays.items():
        if len(blobs) == 4:
            weight, bias, mean, variance = blobs
            file[layer] = [factor * mean, factor * variance, torch.tensor([factor])]
            file["scale" + layer.removeprefix("bn")] = [weight, bias]
        else:
            file[layer] = blobs
    return file


# CaffeNet and torchvision's AlexNet

_ALEXNET = {  # out, inputs a group, kernel, pad, groups
    "caffe": ((96, 3, 11, 100, 1), (256, 48, 5, 2, 2), (384, 256, 3, 1, 1), (384, 192, 3, 1, 2), (256, 192, 3, 1, 2)),
    "torchvision": (
        (64, 3, 11, 100, 1), (192, 64, 5, 2, 1), (384, 192, 3, 1, 1), (256, 384, 3, 1, 1), (256, 256, 3, 1, 1),
    ),
}  # fmt: skip
_ALEXNET_NAMES = {
    "caffe": ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"),
    "torchvision": (*(f"features.{n}" for n in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"),
}


def alexnet_table(style: str) -> Table:
    *names, fc6, fc7 = _ALEXNET_NAMES[style]
    table = {name: conv(out, inputs, k) for name, (out, inputs, k, _, _) in zip(names, _ALEXNET[style], strict=True)}
    return table | {fc6: conv(4096, 256, 6), fc7: conv(4096, 4096, 1)}


def alexnet(net: Net, x: Tensor, style: str) -> Tensor:
    *names, fc6, fc7 = _ALEXNET_NAMES[style]
    for index, (name, (_, _, _, pad, groups)) in enumerate(zip(names, _ALEXNET[style], strict=True), 1):
        x = net.relu(x, name, pad, stride=4 if index == 1 else 1, groups=groups)
        if index in (1, 2, 5):
            x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        if index in (1, 2) and style == "caffe":
            x = lrn(x)
    return net.fully(net.fully(x, fc6, 6), fc7, 1)


def lrn(x: Tensor) -> Tensor:
    """Across five channels: x / (1 + alpha / 5 sum x²)^beta."""
    squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
    return x / (1 + 1e-4 / 5 * squares) ** 0.75


def fcn_alexnet(net: Net, x: Tensor) -> Tensor:
    score = net.conv(alexnet(net, x, "caffe"), "score_fr")
    return crop(net.deconv(score, "upscore", 32), 18, x)


# GoogLeNet

INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32), "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64), "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64), "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128), "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}  # fmt: skip
_PARTS = {
    "caffe": ("1x1", "3x3_reduce", "3x3", "5x5_reduce", "5x5", "pool_proj"),
    "torchvision": ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1"),
}


def googlenet_table(style: str) -> Table:
    caffe = style == "caffe"
    stems = ("conv1/7x7_s2", "conv2/3x3_reduce", "conv2/3x3") if caffe else ("conv1", "conv2", "conv3")
    shapes = dict(zip(stems, ((64, 3, 7), (64, 64, 1), (192, 64, 3)), strict=True))
    for name, (inputs, one, reduce3, three, reduce5, five, project) in INCEPTIONS.items():
        before = f"inception_{name}/" if caffe else f"inception{name}."
        parts = [
            (one, inputs, 1), (reduce3, inputs, 1), (three, reduce3, 3), (reduce5, inputs, 1),
            (five, reduce5, 5 if caffe else 3), (project, inputs, 1),
        ]  # fmt: skip
        shapes |= {before + part: shape for part, shape in zip(_PARTS[style], parts, strict=True)}
    if caffe:
        return {name: conv(*shape) for name, shape in shapes.items()}
    table: Table = {}
    for name, shape in shapes.items():
        table |= {f"{name}.conv": conv(*shape, bias=False), f"{name}.bn": norm(shape[0])}
    return table


def googlenet(net: Net, x: Tensor, style: str) -> Tensor:
    """inception_5b."""
    caffe = style == "caffe"

    def layer(x: Tensor, name: str, pad: int = 0, stride: int = 1) -> Tensor:
        if caffe:
            return net.relu(x, name, pad, stride=stride)
        return net.norm(net.conv(x, f"{name}.conv", pad, stride=stride), f"{name}.bn", 1e-3).relu()

    def halve(x: Tensor, kernel: int = 3) -> Tensor:
        return F.max_pool2d(x, kernel, 2, ceil_mode=True)

    stems = ("conv1/7x7_s2", "conv2/3x3_reduce", "conv2/3x3") if caffe else ("conv1", "conv2", "conv3")
    x = halve(layer(x, stems[0], 3, 2))
    x = lrn(x) if caffe else x
    x = layer(layer(x, stems[1]), stems[2], 1)
    x = halve(lrn(x) if caffe else x)
    for name in INCEPTIONS:
        x = halve(x) if name == "4a" else halve(x, 3 if caffe else 2) if name == "5a" else x
        before = f"inception_{name}/" if caffe else f"inception{name}."
        one, reduce3, three, reduce5, five, project = (before + part for part in _PARTS[style])
        around = F.max_pool2d(x, 3, 1, 1)
        branches = [
            layer(x, one),
            layer(layer(x, reduce3), three, 1),
            layer(layer(x, reduce5), five, 2 if caffe else 1),
            layer(around, project),
        ]
        x = torch.cat(branches, 1)
    return x


def fcn_googlenet(net: Net, x: Tensor) -> Tensor:
    """No reference was released: score_fr and upscore as our documentation has them."""
    score = net.conv(googlenet(net, x, "caffe"), "score_fr")
    return crop(net.deconv(score, "upscore", 32), 1, x)
