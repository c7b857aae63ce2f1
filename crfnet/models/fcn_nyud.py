"""FCN on NYUDv2 with colour and HHA fused late (arXiv:1411.4038, section 5; nyud-fcn32s-color-hha/net.py).

HHA is a depth map as three channels in 0..255: disparity, height above the floor, angle to gravity. Two whole networks
score colour and HHA; the mean of their scores is enlarged. The other inputs are conventions of the plain networks:

    FCN32s(40, convention=NYUD_COLOUR)          colour
    FCN32s(40, convention=NYUD_HHA)             HHA alone
    FCN32s(40, convention=NYUD_COLOUR_DEPTH)    colour and depth in four channels, early fusion
"""

from torch import Tensor, nn

from crfnet.models.fcn import HEADS, Trunk
from crfnet.models.preprocess import NYUD_COLOUR, NYUD_HHA, Preprocess


class LateFusionFCN(nn.Module):
    """Two FCNs, one for colour and one for HHA, whose scores are averaged.

    Args:
        num_classes: number of labels ``L``, 40 in NYUDv2.
        stride: of the heads, 32 or 16 as in the paper's table 4, or 8.

    Shape:
        image ``(B, 6, H, W)``, RGB in 0..255 and HHA in 0..255 as stored → logits ``(B, L, H, W)``.
    """

    def __init__(self, num_classes: int = 40, *, stride: int = 32) -> None:
        super().__init__()
        if stride not in HEADS:
            raise ValueError(f"stride must be one of {sorted(HEADS)}, got {stride}")
        self.preprocess = nn.ModuleDict({"colour": Preprocess(NYUD_COLOUR), "hha": Preprocess(NYUD_HHA)})
        self.trunk = nn.ModuleDict({name: Trunk() for name in self.preprocess})
        self.head = nn.ModuleDict({name: HEADS[stride](num_classes) for name in self.preprocess})
        last = {32: "upscore", 16: "upscore16", 8: "upscore8"}[stride]
        delattr(self.head["hha"], last)  # colour's enlarges the mean of both

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size."""
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 6:
            raise ValueError(f"image must be (B, 6, H, W), colour and HHA, got {tuple(getattr(image, 'shape', ()))}")
        scores = [
            self.head[name].scores(self.trunk[name](self.preprocess[name](channels)))  # type: ignore[operator]
            for name, channels in (("colour", image[:, :3]), ("hha", image[:, 3:]))
        ]
        fused = 0.5 * scores[0] + 0.5 * scores[1]
        out: Tensor = self.head["colour"].enlarge(fused, image.shape[2:]) if upsample else fused  # type: ignore[operator]
        return out
