"""The network: sizes, output stride, gradients to every parameter, and errors."""

import pytest
import torch

from crfnet import DenseCRF
from crfnet.models import SmallDeepLab, WithCRF


def make(num_classes: int = 3, **settings) -> SmallDeepLab:
    torch.manual_seed(0)
    return SmallDeepLab(num_classes, width=4, **settings)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (64, 48), (65, 49)])
def test_logits_have_the_size_of_the_image(size):
    logits = make().eval()(torch.rand(2, 3, *size) * 255)
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


def test_scores_have_output_stride_8():
    network, seen = make().eval(), []
    network.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    network(torch.rand(1, 3, 64, 96) * 255)
    assert seen == [(8, 12)]


def test_batch_items_do_not_touch_in_evaluation():
    network, images = make().eval(), torch.rand(2, 3, 24, 32) * 255
    # single precision, other summation orders for another batch size
    torch.testing.assert_close(network(images)[1:], network(images[1:]), rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient():
    network = make()
    network(torch.rand(2, 3, 40, 40) * 255).square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == []


def test_it_learns_where_the_bright_half_is():
    network = make(2, dropout=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        left = torch.randint(8, 56, (4,), generator=generator)
        labels = (torch.arange(64)[None, None] >= left[:, None, None]).long().expand(4, 64, 64)
        images = 60 + 130 * labels[:, None] + 20 * torch.randn(4, 3, 64, 64, generator=generator)
        images = images.clamp(0, 255)
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network.eval()(images).argmax(1) == labels).float().mean() > 0.95  # 0.5 by chance


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"image must be \(B, 3, H, W\), not empty, got \(3, 8, 8\)"):
        make()(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="num_classes"):
        SmallDeepLab(0)


def test_network_with_crf_is_the_crf_of_its_logits():
    network, crf = make(), DenseCRF(3, theta_alpha=8.0, theta_beta=20.0)
    both = WithCRF(network, crf).eval()
    image, mask = torch.rand(1, 3, 20, 24) * 255, torch.ones(1, 20, 24, dtype=torch.bool)
    mask[:, :, 16:] = False
    with torch.no_grad():
        assert torch.equal(both(image), crf(network(image), image))
        assert torch.equal(both(image, mask), crf(network(image), image, mask))
        assert not torch.equal(both(image), both(image, mask))


def test_loss_behind_the_crf_reaches_network_and_crf():
    both = WithCRF(make(dropout=0.0), DenseCRF(3, theta_alpha=8.0, theta_beta=20.0))
    both(torch.rand(2, 3, 20, 24) * 255).square().mean().backward()
    missing = [name for name, p in both.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missing == []
