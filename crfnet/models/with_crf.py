"""A network and the CRF that refines its logits, guided by the same image, as one module (CRF-RNN's arrangement)."""

from torch import Tensor, nn

from crfnet.crf import DenseCRF


class WithCRF(nn.Module):
    """``crf(network(image), image)``.

    Args:
        network: from images ``(B, 3, H, W)`` to logits ``(B, L, H, W)``.
        crf: for ``L`` labels, its ``image_range`` that of the network's input.

    Shape:
        image ``(B, 3, H, W)``, mask ``(B, H, W)`` bool (True = the pixel takes part) → logits ``(B, L, H, W)``.

    Source: Zheng et al., arXiv:1502.03240, section 5.
    """

    def __init__(self, network: nn.Module, crf: DenseCRF) -> None:
        super().__init__()
        self.network, self.crf = network, crf

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the marginals at the image's own size."""
        refined: Tensor = self.crf(self.network(image), image, mask)
        return refined
