"""CRF-RNN: FCN-8s under a dense CRF, one network (arXiv:1502.03240, sections 4 and 5; TVG_CRFRNN_new_deploy.prototxt).

    FCN-8s logits → T mean-field iterations: bilateral kernel 160 px / 3 levels, spatial 3 px, (L, L) weights

Unlike the published FCN-8s, this one learns its two deconvolutions by 2, the first of them with a bias.
"""

from crfnet.crf import DenseCRF
from crfnet.models.fcn import FCN, Head8s, Trunk
from crfnet.models.preprocess import FCN as CONVENTION
from crfnet.models.with_crf import WithCRF


class CRFRNN(WithCRF):
    """FCN-8s with the CRF-RNN layer; 5 iterations in training and 10 in evaluation, as the paper has it.

    Args:
        num_classes: number of labels ``L``.
        crf: the layer; CRF-RNN's parameters where it is left out.

    Shape:
        image ``(B, 3, H, W)``, RGB in 0..255, mask ``(B, H, W)`` bool → logits of the marginals ``(B, L, H, W)``.
        The published network sees images of at most 500 pixels, padded to 500 x 500 with the mean colour, and lets
        padding take part in the CRF; a mask leaves it out.
    """

    def __init__(self, num_classes: int = 21, *, crf: DenseCRF | None = None) -> None:
        if crf is not None and getattr(crf, "num_classes", None) != num_classes:
            raise ValueError(f"crf must be a DenseCRF of {num_classes} classes, got {crf}")
        head = Head8s(num_classes, learn_upsampling=True, upscore2_bias=True)
        super().__init__(FCN(Trunk(), head, CONVENTION), DenseCRF(num_classes) if crf is None else crf)
