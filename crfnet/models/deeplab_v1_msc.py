"""DeepLab-MSc: DeepLab v1 whose scores also come from the image and pool1 to pool4 (arXiv:1412.7062, section 4.1).

| source | 3x3 of 128, stride in training | then                                  |
| image  | 8                              | ReLU, dropout, 1x1 of 128, ReLU, dropout, 1x1 scores |
| pool1  | 4                              | same                                  |
| pool2  | 2                              | same                                  |
| pool3  | 1                              | same                                  |
| pool4  | 1                              | same                                  |

All six score maps are added. The paper concatenates 5 x 128 channels before one classifier, which is the same linear
map; this is the released code. So is that at test the branches run at stride 1, each enlarged by itself.
"""

from typing import Literal

from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.deeplab_v1 import DeepLabV1
from crfnet.models.geometry import crop, interp, pad_to, subsample_labels
from crfnet.models.preprocess import DEEPLAB, Convention
from crfnet.models.vgg import score_layer, zero

SOURCES = ("data", "pool1", "pool2", "pool3", "pool4")
CHANNELS, STRIDES = (3, 64, 128, 256, 512), (8, 4, 2, 1, 1)


class Branch(nn.Module):
    """Scores of one source."""

    def __init__(self, source: str, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(inputs, 128, 3, padding=1), nn.Conv2d(128, 128, 1)
        for layer, std in ((self.conv, 0.001), (self.fc, 0.005 if source == "pool4" else 0.001)):
            nn.init.normal_(layer.weight, std=std)
            zero(layer.bias)
        self.ms = score_layer(128, num_classes, std=0.0 if source == "pool3" else 0.01)  # pool3's has no filler
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, stride: int) -> Tensor:
        """``(B, L, h, w)``, every ``stride``-th position of the 3x3 convolution."""
        x = nn.functional.conv2d(x, self.conv.weight, self.conv.bias, stride, padding=1).relu()
        scores: Tensor = self.ms(self.dropout(self.fc(self.dropout(x)).relu()))
        return scores


class DeepLabV1MSc(nn.Module):
    """DeepLab-MSc-LargeFOV or DeepLab-MSc.

    The released nets keep a trained DeepLab as it is (learning rate 0) and train the branches: ``network.base`` is the
    DeepLab, ``network.branches`` the rest.

    Args:
        num_classes: number of labels ``L``.
        variant: "largefov", or "deeplab", which has 3x3 pools here.
        convention: channels and mean of the input.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``; with ``upsample=False`` scores of stride 8 as
        in training, of images of 8 k + 1 pixels: 321 x 321 gives 41 x 41. ``subsample`` picks their labels.
    """

    output_stride = 8

    def __init__(
        self,
        num_classes: int = 21,
        *,
        variant: Literal["largefov", "deeplab"] = "largefov",
        convention: Convention = DEEPLAB,
    ) -> None:
        super().__init__()
        among("variant", variant, ("largefov", "deeplab"))
        self.base = DeepLabV1(num_classes, variant=variant, pools="3x3", convention=convention)
        self.branches = nn.ModuleDict(
            {name: Branch(name, channels, num_classes) for name, channels in zip(SOURCES, CHANNELS, strict=True)}
        )

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size, the sum of six bilinear enlargements."""
        x = self.base.preprocess(image)
        if not upsample and any(n % 8 != 1 for n in x.shape[2:]):
            raise ValueError(
                f"image must have 8 k + 1 pixels an axis for scores, as 321 x 321, got {tuple(x.shape[2:])}"
            )
        x = pad_to(x, 8, 1)
        stages = self.base.stages(x)
        scores = self.base.classify(stages[-1])
        if upsample:
            scores = interp(scores, x.shape[2:])
        for name, source, stride in zip(SOURCES, [x, *stages[:4]], STRIDES, strict=True):
            branch = self.branches[name]
            scores = scores + (interp(branch(source, 1), x.shape[2:]) if upsample else branch(source, stride))
        return crop(scores, 0, image.shape[2:]) if upsample else scores

    def subsample(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` labels at the scores of ``upsample=False``: crops of 8 k + 1 pixels."""
        return subsample_labels(labels, stride=8)
