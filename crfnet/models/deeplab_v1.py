"""DeepLab v1: VGG-16 with holes at stride 8 (arXiv:1412.7062, sections 3.1, 3.2 and table 2; the released prototxts).

| variant    | pool1-3 (s2) | pool4 (s1) | pool5 (s1)           | fc6                  | fc7  | field of view |
| "deeplab"  | 2x2 pad 1    | 2x2        | 3x3                  | 4096, 4x4, hole 4    | 4096 | 128           |
| "7x7"      | 2x2 pad 1    | 2x2        | 3x3                  | 4096, 7x7, hole 4    | 4096 | 224           |
| "4x4"      | 2x2 pad 1    | 2x2        | 3x3                  | 4096, 4x4, hole 8    | 4096 | 224           |
| "largefov" | 3x3 pad 1    | 3x3 pad 1  | 3x3, average 3x3     | 1024, 3x3, hole 12   | 1024 | 224           |

conv5_1 to conv5_3 have hole 2. The paper's "input stride" is the hole. Pools of 3x3 put score i at pixel 8 i; with
pools of 2x2 pool4's padding decides: none in training (pixel 8 i + 1, labels 1, 9, ...), 1 at test (8 i - 7).
"""

from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from crfnet.inputs import among
from crfnet.models.geometry import crop, pad_to, subsample_labels, zoom
from crfnet.models.preprocess import DEEPLAB, Convention, Preprocess
from crfnet.models.vgg import VGG16, fully_connected, score_layer

Variant = Literal["largefov", "deeplab", "7x7", "4x4"]


class Fc6(NamedTuple):
    """What distinguishes the variants."""

    channels: int  # of fc6 and fc7
    kernel: int
    hole: int


FC6: dict[str, Fc6] = {
    "deeplab": Fc6(4096, 4, 4),
    "7x7": Fc6(4096, 7, 4),
    "4x4": Fc6(4096, 4, 8),
    "largefov": Fc6(1024, 3, 12),
}


def three_by_three_pools() -> list[nn.Module]:
    """LargeFOV's pool1 to pool5, which DeepLab v2 has as well."""
    return [nn.MaxPool2d(3, stride, padding=1, ceil_mode=True) for stride in (2, 2, 2, 1, 1)]


def two_by_two_pools() -> list[nn.Module]:
    """pool1 to pool5 of the other variants; pool4 as at test."""
    halving: list[nn.Module] = [nn.MaxPool2d(2, 2, padding=1, ceil_mode=True) for _ in range(3)]
    return [*halving, nn.MaxPool2d(2, 1, padding=1, ceil_mode=True), nn.MaxPool2d(3, 1, padding=1, ceil_mode=True)]


class DeepLabV1(nn.Module):
    """DeepLab v1 on VGG-16.

    Args:
        num_classes: number of labels ``L``.
        variant: "largefov", "deeplab", "7x7" or "4x4", see the table.
        pools: "3x3" or "2x2" instead of the variant's own; under MSc "deeplab" has 3x3.
        convention: channels and mean of the input.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255 → logits ``(B, L, H, W)``; with ``upsample=False`` scores of stride 8 as
        in training: 321 x 321 gives 41 x 41, with 2x2 pools 306 x 306 gives 39 x 39. ``subsample`` picks their labels.
    """

    output_stride = 8
    aligned: bool  # whether score i lies at pixel 8 i

    def __init__(
        self,
        num_classes: int = 21,
        *,
        variant: Variant = "largefov",
        pools: Literal["2x2", "3x3"] | None = None,
        convention: Convention = DEEPLAB,
    ) -> None:
        super().__init__()
        among("variant", variant, get_args(Variant))
        if pools is not None:
            among("pools", pools, ("2x2", "3x3"))
        large = variant == "largefov"
        self.aligned = pools == "3x3" or (large and pools is None)
        channels, kernel, hole = FC6[variant]
        self.preprocess = Preprocess(convention)
        self.vgg = VGG16(
            three_by_three_pools() if self.aligned else two_by_two_pools(),
            channels=len(convention.order),
            last_hole=2,
        )
        self.pool5a = nn.AvgPool2d(3, 1, padding=1) if large else nn.Identity()
        self.fc6 = fully_connected(512, channels, kernel, hole=hole, padding=hole * (kernel - 1) // 2)
        self.fc7 = fully_connected(channels, channels, 1)
        self.fc8 = score_layer(channels, num_classes, std=0.01)

    def forward(self, image: Tensor, *, upsample: bool = True) -> Tensor:
        """Logits at the image's own size, bilinear from the scores."""
        x = self.preprocess(image)
        if not upsample:
            return self.classify(self.stages(x, pad_pool4=False)[-1])
        x = pad_to(x, 8, 1 if self.aligned else 2)
        return crop(zoom(self.scores(x), 8), 0 if self.aligned else 7, image.shape[2:])

    def stages(self, x: Tensor, *, pad_pool4: bool = True) -> list[Tensor]:
        """pool1 to pool5 of a preprocessed image; ``pad_pool4=False`` as in training with 2x2 pools."""
        outputs = []
        for number in range(1, 6):
            x = self.vgg.stage(number, x)
            if number == 4 and not pad_pool4 and not self.aligned:
                x = x[..., 1:-1, 1:-1]  # what pool4 gives without padding
            outputs.append(x)
        return outputs

    def scores(self, x: Tensor) -> Tensor:
        """``(B, L, h, w)`` of stride 8 from a preprocessed image, as at test."""
        return self.classify(self.stages(x)[-1])

    def classify(self, pool5: Tensor) -> Tensor:
        """The same from pool5."""
        scores: Tensor = self.fc8(self.fc7(self.fc6(self.pool5a(pool5))))
        return scores

    def subsample(self, labels: Tensor) -> Tensor:
        """``(B, H, W)`` labels at the scores of ``upsample=False``: crops of 8 k + 1 pixels, with 2x2 pools 8 k + 2."""
        return subsample_labels(labels, stride=8, offset=0 if self.aligned else 1)
