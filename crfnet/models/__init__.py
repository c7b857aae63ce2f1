"""Networks from images (B, 3, H, W), RGB in 0..255, to logits (B, L, H, W), one network a file."""

from crfnet.models.averaged import Averaged
from crfnet.models.backbone import BackboneDeepLab
from crfnet.models.crfrnn import CRFRNN
from crfnet.models.deeplab_v1 import DeepLabV1
from crfnet.models.deeplab_v1_msc import DeepLabV1MSc
from crfnet.models.deeplab_v2 import DeepLabV2Name, deeplab_v2
from crfnet.models.deeplab_v2_resnet import DeepLabV2ResNet
from crfnet.models.deeplab_v2_vgg import DeepLabV2VGG
from crfnet.models.dilate import dilate
from crfnet.models.fcn import FCN8s, FCN16s, FCN32s, start_from
from crfnet.models.fcn_alexnet import FCNAlexNet
from crfnet.models.fcn_googlenet import FCNGoogLeNet
from crfnet.models.fcn_nyud import LateFusionFCN
from crfnet.models.fcn_siftflow import SiftFlowFCN
from crfnet.models.heads import ASPP, LargeFOV
from crfnet.models.multi_scale import MultiScale
from crfnet.models.preprocess import (
    DEEPLAB,
    NYUD_COLOUR,
    NYUD_COLOUR_DEPTH,
    NYUD_HHA,
    PASCAL_CONTEXT,
    SIFT_FLOW,
    TORCHVISION,
    Convention,
    Preprocess,
)
from crfnet.models.resnet import ResNet
from crfnet.models.small import SmallDeepLab
from crfnet.models.tiled import Tiled
from crfnet.models.with_crf import WithCRF

__all__ = [
    "ASPP",
    "Averaged",
    "CRFRNN",
    "DEEPLAB",
    "PASCAL_CONTEXT",
    "SIFT_FLOW",
    "BackboneDeepLab",
    "Convention",
    "DeepLabV1",
    "DeepLabV1MSc",
    "DeepLabV2Name",
    "DeepLabV2ResNet",
    "DeepLabV2VGG",
    "FCN8s",
    "FCN16s",
    "FCN32s",
    "FCNAlexNet",
    "FCNGoogLeNet",
    "LargeFOV",
    "LateFusionFCN",
    "MultiScale",
    "NYUD_COLOUR",
    "NYUD_COLOUR_DEPTH",
    "NYUD_HHA",
    "Preprocess",
    "ResNet",
    "SiftFlowFCN",
    "SmallDeepLab",
    "TORCHVISION",
    "Tiled",
    "WithCRF",
    "deeplab_v2",
    "dilate",
    "start_from",
]
