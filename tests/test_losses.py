"""Losses against plain formulas, with what each paper's Caffe layer divides by."""

from functools import partial

import pytest
import torch
from slim import make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crfnet import DenseCRF
from crfnet.losses import (
    at_scores,
    both_labellings,
    cross_entropy,
    cross_entropy_part,
    full_resolution,
    multi_scale,
    multi_scale_loss,
    multi_scale_parts,
    through_crf,
)
from crfnet.models import (
    DeepLabV1,
    DeepLabV1MSc,
    DeepLabV2VGG,
    MultiScale,
    SiftFlowFCN,
    WithCRF,
)
from crfnet.models.multi_scale import Scores


def draw(*shape: int, void: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (B, L, H, W), and labels of which a part is void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, generator=generator)
    labels = torch.randint(0, shape[1], shape[:1] + shape[2:], generator=generator)
    return logits, torch.where(torch.rand(labels.shape, generator=generator) < void, 255, labels)


def plain(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Sum of -log p of the label, pixel by pixel in float64, and the number of pixels that have one."""
    total, count = 0.0, 0
    for scores, truth in zip(logits.double().movedim(1, -1).flatten(0, -2), labels.flatten(), strict=True):
        if truth != 255:
            total += float(scores.exp().sum().log() - scores[truth])
            count += 1
    return total, count


class Known(nn.Module):
    """A network whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


def test_the_sum_and_what_divides_it():
    logits, labels = draw(2, 4, 5, 6)
    total, count = plain(logits, labels)
    for given, rel in ((logits, 1e-5), (logits.double(), 1e-12)):  # sums of some tens of numbers
        got, number = cross_entropy_part(given, labels)
        assert got.item() == pytest.approx(total, rel=rel) and number == count
        assert cross_entropy(given, labels).item() == pytest.approx(total / count, rel=rel)
    other = torch.where(labels == 255, 9, labels)
    assert torch.equal(cross_entropy(logits, other, ignore_index=9), cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=r"must belong together, got \(2, 4, 5, 6\) and \(2, 5, 5\)"):
        cross_entropy_part(logits, labels[..., :5])


def test_without_a_label_loss_and_gradient_are_zero():
    logits, labels = draw(1, 3, 4, 4, void=1.1)
    loss = cross_entropy(logits.requires_grad_(), labels)
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_full_resolution_divides_by_pixels_or_by_images():
    """DeepLab's layers by the valid pixels; FCN's (normalize: false) by the batch, so that one image is a plain sum."""
    logits, labels = draw(2, 4, 5, 6)
    batch = (torch.zeros(2, 3, 5, 6), labels, torch.ones_like(labels, dtype=torch.bool))
    total, count = plain(logits, labels)
    for normalize, wanted in ((True, count), (False, 2)):
        ((value, divisor),) = full_resolution(Known(logits), batch, normalize=normalize)
        assert value.item() == pytest.approx(total, rel=1e-5) and divisor == wanted
    assert full_resolution(Known(logits), batch[:2])[0][1] == count


@pytest.mark.parametrize(
    ("build", "size", "first"),
    [
        (partial(DeepLabV1, variant="largefov"), 33, 0),
        (partial(DeepLabV1, variant="deeplab"), 34, 1),  # pools of 2x2: labels 1, 9, ...
        (DeepLabV1MSc, 33, 0),
        (DeepLabV2VGG, 33, 0),
    ],
)
def test_at_scores_takes_the_label_of_each_score(build, size, first):
    network = make(build)
    image = 255 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    _, labels = draw(2, 21, size, size)
    with torch.no_grad():
        scores = network(image, upsample=False)
        ((value, divisor),) = at_scores(network, (image, labels, labels != 255))
    total, count = plain(scores, labels[:, first::8, first::8])
    assert scores.shape[2:] == ((size - 1 - first) // 8 + 1,) * 2
    assert value.item() == pytest.approx(total, rel=1e-5) and divisor == count


def test_at_scores_finds_the_network_within_its_wrapper():
    network, wrapper = make(partial(DeepLabV1, num_classes=3)), DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = network
    wrapper.forward = network.forward
    batch = (torch.rand(1, 3, 33, 33) * 255, torch.zeros(1, 33, 33, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(at_scores(wrapper, batch)[0][0], at_scores(network, batch)[0][0])


def test_siftflow_loss_is_the_sum_of_both_tasks():
    network = make(lambda: SiftFlowFCN(stride=32), divisor=32)
    for head in (network.semantic, network.geometric):
        nn.init.normal_(head.score_fr.weight)
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(2, 3, 9, 11, generator=generator)
    labels = torch.stack([torch.randint(n, (2, 9, 11), generator=generator) for n in (33, 3)], 1)
    labels[0, 1, :3], labels[1, 0, 2:5] = 255, 255
    parts = both_labellings(network, (image, labels, labels[:, 0] != 255))
    logits = network(image)
    wanted = [
        F.cross_entropy(x, y, ignore_index=255)
        for x, y in ((logits.semantic, labels[:, 0]), (logits.geometric, labels[:, 1]))
    ]
    torch.testing.assert_close([total / count for total, count in parts], wanted)
    sums = both_labellings(network, (image, labels), normalize=False)
    assert [(total.item(), count) for total, count in sums] == [(total.item(), 2) for total, _ in parts]
    sum(total for total, _ in parts).backward()
    assert all(head.score_fr.weight.grad.abs().max() > 0 for head in (network.semantic, network.geometric))
    for wrong in (labels[:, 0], labels[:, :1]):
        with pytest.raises(ValueError, match=r"labels must be \(B, 2, H, W\), semantic and geometric, got"):
            both_labellings(network, (image, wrong))


def test_padding_takes_no_part_in_the_crf():
    logits, labels = draw(2, 3, 8, 9)
    image = 255 * torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(2))
    inside = torch.ones(2, 8, 9, dtype=torch.bool)
    inside[0, 6:], inside[1, :, 5:] = False, False
    labels = torch.where(inside, labels, 255)
    crf = DenseCRF(3, theta_alpha=6.0, theta_beta=40.0).train()
    network = WithCRF(Known(logits), crf)
    with torch.no_grad():
        alone = [(crf(logits[:1, :, :6], image[:1, :, :6]), labels[:1, :6])]
        alone.append((crf(logits[1:, ..., :5], image[1:, ..., :5]), labels[1:, :, :5]))
        sums = [plain(*item) for item in alone]
        for normalize, wanted in ((True, sum(count for _, count in sums)), (False, 2)):
            ((value, divisor),) = through_crf(network, (image, labels, inside), normalize=normalize)
            assert value.item() == pytest.approx(sum(total for total, _ in sums), rel=1e-4)  # float32 marginals
            assert divisor == wanted


def test_three_scales_add_four_means():
    _, labels = draw(2, 3, 33, 65)
    sizes = [(5, 9), (5, 9), (5, 9), (3, 5)]
    scores = Scores(*(draw(2, 3, *size, seed=seed)[0] for seed, size in enumerate(sizes)))
    wanted = [plain(part, labels[:, :: 8 * k, :: 8 * k]) for part, k in zip(scores, (1, 1, 1, 2), strict=True)]
    parts = multi_scale_parts(scores, labels)
    for (value, divisor), (total, count) in zip(parts, wanted, strict=True):
        assert value.item() == pytest.approx(total, rel=1e-5) and divisor == count
    mean = sum(total / count for total, count in wanted)
    assert multi_scale_loss(scores, labels).item() == pytest.approx(mean, rel=1e-5)


def test_three_scales_of_a_network_and_its_batch():
    network = MultiScale(make(partial(DeepLabV2VGG, 3, head="largefov"))).eval()
    image = 255 * torch.rand(2, 3, 33, 65, generator=torch.Generator().manual_seed(3))
    _, labels = draw(2, 3, 33, 65)
    with torch.no_grad():
        scores = network(image, upsample=False)
        parts = multi_scale(network, (image, labels, labels != 255))
    for (value, divisor), part, stride in zip(parts, scores, (8, 8, 8, 16), strict=True):
        total, count = plain(part, labels[:, ::stride, ::stride])
        assert value.item() == pytest.approx(total, rel=1e-5) and divisor == count
    with pytest.raises(ValueError, match=r"labels must have 32 k \+ 1 pixels an axis"):
        multi_scale(network, (image[..., :41], labels[..., :41]))


@pytest.mark.gpu
def test_deterministic_algorithms_change_no_loss_on_a_gpu():
    """Nor its gradient; torch has no such sum for images, so that pixels go one by one there."""
    logits, labels = (tensor.cuda() for tensor in draw(2, 5, 7, 6))
    logits.requires_grad_()
    found, wanted = cross_entropy(logits, labels), cross_entropy(logits.detach().cpu().double(), labels.cpu())
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(found, logits)
    double = logits.detach().cpu().double().requires_grad_()
    (truth,) = torch.autograd.grad(cross_entropy(double, labels.cpu()), double)
    torch.testing.assert_close(slope.cpu().double(), truth, rtol=1e-5, atol=1e-8)
