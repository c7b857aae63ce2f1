"""A network and the CRF that refines its logits, guided by the same image, as one module (CRF-RNN's arrangement)."""

from torch import Tensor, nn
from torch.nn import functional as F

from crfnet.crf import DenseCRF


class WithCRF(nn.Module):
    """``crf(network(image), image)``.

    Args:
        network: from images ``(B, 3, H, W)`` to logits ``(B, L, H, W)``. Logits of another size, as many networks of
            today return, are enlarged bilinearly to the image's.
        crf: for ``L`` labels, its ``image_range`` that of the image.
        preprocess: what the image must go through before a network of your own; the CRF sees the image as it came.
            ``crfnet.models.Preprocess(crfnet.models.TORCHVISION)`` serves those of torchvision, timm and most others.
            The networks of this package do it themselves.
        frozen: the network does not learn, and stays in evaluation mode whatever ``train()`` says: the CRF alone is
            fitted to its unaries (piecewise training by gradient). Its parameters lose ``requires_grad``.

    Shape:
        image ``(B, 3, H, W)``, mask ``(B, H, W)`` bool (True = the pixel takes part) → logits ``(B, L, H, W)``.

    Source: Zheng et al., arXiv:1502.03240, section 5.
    """

    def __init__(
        self, network: nn.Module, crf: DenseCRF, *, preprocess: nn.Module | None = None, frozen: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module) or not isinstance(crf, DenseCRF):
            raise TypeError(
                f"network must be a module and crf a DenseCRF, got {type(network).__name__} and {type(crf).__name__}"
            )
        self.network, self.crf, self.preprocess, self.frozen = network, crf, preprocess, frozen
        if frozen:
            network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "WithCRF":
        """As `torch.nn.Module.train`, but for a frozen network."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of the marginals at the image's own size."""
        logits = self.network(image if self.preprocess is None else self.preprocess(image))
        if not isinstance(logits, Tensor) or logits.ndim != 4:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(
                f"network must return logits (B, L, H, W), one tensor, got {got}: wrap it in a module that does"
            )
        if logits.shape[2:] != image.shape[2:]:
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        refined: Tensor = self.crf(logits, image, mask)
        return refined
