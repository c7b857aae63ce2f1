"""Weizmann horses: a DCNN from scratch, a dense CRF fitted to it, both trained as one, and two ablations.

    python recipes/horses.py --root /data/horses --seed 0

209 photographs to train, 53 for the scores, horse or not. Whatever is chosen (the CRF's parameters, which moment of a
training to keep) is chosen on images held out of train; `val` is scored once a stage.

| row         | what |
| dcnn        | the DCNN alone |
| piecewise   | the same DCNN under the CRF that DeepLab's search finds (arXiv:1412.7062, section 5): trained apart |
| gradient    | piecewise by gradient: the DCNN frozen, (L, L) weights and compatibilities learnt from there |
| tuned       | the DCNN alone, trained on exactly as the joint one is: what the longer training is worth |
| joint       | both end to end from the search's CRF (CRF-RNN, arXiv:1502.03240, section 6) |
| crops       | joint on crops of 96 pixels with the lattice, against ... |
| crops_exact | ... the same with the exact engine in training |

Writes results.json, report.md, trimap.png, panel.png, search.csv, search.png, the network of each row, and log and
checkpoints of each stage; a run that was stopped goes on with --resume.
"""

import copy
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from crfnet import DenseCRF, weights
from crfnet.data import Crop, Samples, hold_out, pairs_files
from crfnet.evaluation import evaluate
from crfnet.inputs import whole_number
from crfnet.losses import full_resolution, through_crf
from crfnet.models import SmallDeepLab, WithCRF
from crfnet.ops.operator import Method
from crfnet.optim import parameter_groups, poly_policy
from crfnet.piecewise import fit
from crfnet.processes import rank, start, world_size
from crfnet.progress import bar
from crfnet.report import Report
from crfnet.runs import begin
from crfnet.training import Settings, train
from crfnet.tuning import Grid


@dataclass(frozen=True)
class Config:
    """Settings of the recipe; the command line has a flag for each."""

    root: str = "data/horses"  # with train.txt and val.txt
    out: str = "runs/horses"
    seed: int = 0
    threads: int = 0  # 0: as many as torch likes
    device: str = "cpu"
    resume: bool = False
    tensorboard: bool = False  # writes the logs for TensorBoard too
    held_out: int = 40  # training images kept for every choice
    ablations: bool = True
    # the DCNN
    width: int = 24  # channels of its first stage
    iterations: int = 3200
    batch_size: int = 8
    crop: int = 160
    scale: tuple[float, float] = (0.7, 1.4)  # of the images, log-uniform
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    average: float = 0.995  # of the parameters, a step
    # the search; theta_alpha in pixels of these images, 250 on the longest side
    grid: Grid = Grid((3.0, 6.0, 12.0), (15.0, 28.0, 50.0), (4.0, 8.0, 16.0), (1.0, 3.0), (1.0,), rounds=2)
    # fine-tuning, whole images, one a step and process
    joint_iterations: int = 676  # four times through
    joint_learning_rate: float = 1e-4  # of the DCNN
    crf_learning_rate: float = 1e-3
    joint_average: float = 0.98
    clip_crf: float = 1.0
    guard_images: int = 24  # training images on which fine-tuning must not lose
    ablation_crop: int = 96
    ablation_iterations: int = 338


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs all stages and returns the scores that it writes."""
    device = start(config.device)
    for name in ("guard_images", "joint_iterations"):
        whole_number(name, getattr(config, name), 1)
    out = begin(config, free=("ablations",))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    alone = Settings(
        config.iterations, config.batch_size, seed=config.seed, average=config.average, tensorboard=config.tensorboard,
        checkpoint_every=400, validate_every=config.iterations // 4,
    )  # fmt: skip
    finer = Settings(  # one image a step and process
        config.joint_iterations, world_size(), seed=config.seed, average=config.joint_average,
        clip_crf=config.clip_crf, freeze_norm=True, tensorboard=config.tensorboard, checkpoint_every=100,
        validate_every=config.joint_iterations // 4, select="mean_iou", guard="train_iou",
    )  # fmt: skip

    files, val_files = pairs_files(config.root, "train"), pairs_files(config.root, "val")
    kept, rest = hold_out(files, config.held_out, seed=config.seed, least=1)
    read = partial(Samples, num_classes=2, seed=config.seed, keep=True)
    held_out, guards = read(kept), read(rest[: config.guard_images])
    report = Report(out, read(val_files), names=("background", "horse"), device=device)

    def judge(network: nn.Module) -> dict[str, float]:
        return {"mean_iou": evaluate(network, held_out, device=device)["mean_iou"]}

    def add(row: str, network: nn.Module) -> None:
        report.add(row, network)
        if not rank():
            weights.save(network, out / f"{row}.safetensors")

    # 1. the DCNN alone: AdamW, crops, mirrors, scales
    dcnn = SmallDeepLab(2, width=config.width).to(device)
    groups = partial(parameter_groups, weight_decay=config.weight_decay, bias_factor=1, head_factor=1)
    train(
        dcnn,
        read(rest, transform=Crop((config.crop, config.crop), scale=config.scale)),
        full_resolution,
        torch.optim.AdamW(groups(dcnn, config.learning_rate)),
        poly_policy(config.iterations, warm_up=config.iterations // 20),
        alone,
        folder=out / "dcnn", resume=config.resume, validate=judge, progress=bar("DCNN"),
    )  # fmt: skip
    add("dcnn", dcnn)

    # 2. piecewise: DeepLab's search on the held-out images
    piecewise, found = fit(dcnn, held_out, config.grid, out, device=device, resume=config.resume)
    add("piecewise", piecewise)

    # 3. from there by gradient, with one recipe for every row: the CRF alone, the DCNN alone, or both
    def fine_tune(row: str, network: nn.Module, crop: int | None = None) -> None:
        torch.manual_seed(config.seed)
        crf = network.crf if isinstance(network, WithCRF) else None
        iterations = config.joint_iterations if crop is None else config.ablation_iterations

        # judged and scored with the engine that whole images get, whatever trained it
        def as_at_test(judged: nn.Module) -> dict[str, float]:
            if crf is not None:
                judged = copy.deepcopy(judged)
                judged.crf.engine = "auto"  # type: ignore[union-attr]
            return judge(judged) | {"train_iou": evaluate(judged, guards, device=device)["mean_iou"]}

        train(
            network,
            read(rest, transform=Crop(None if crop is None else (crop, crop))),
            full_resolution if crf is None else through_crf,
            torch.optim.AdamW(
                groups(
                    network, config.joint_learning_rate, crf_weights=config.crf_learning_rate,
                    crf_compatibility=config.crf_learning_rate,
                )
            ),
            poly_policy(iterations, warm_up=iterations // 20),
            replace(finer, iterations=iterations, validate_every=iterations // 4),
            folder=out / row, resume=config.resume, validate=as_at_test, progress=bar(row),
        )  # fmt: skip
        if crf is not None:
            crf.engine = "auto"
        add(row, network)

    def with_crf(engine: Method = "auto", *, frozen: bool = False) -> WithCRF:
        crf = DenseCRF(2, **asdict(found.parameters), num_iterations=5, num_iterations_eval=10, engine=engine)
        return WithCRF(copy.deepcopy(dcnn), crf, frozen=frozen).to(device)

    fine_tune("gradient", with_crf(frozen=True))
    fine_tune("tuned", copy.deepcopy(dcnn))
    fine_tune("joint", with_crf())
    if config.ablations:
        fine_tune("crops", with_crf("lattice"), config.ablation_crop)
        fine_tune("crops_exact", with_crf("exact"), config.ablation_crop)
    report.write()
    return report.scores


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config))
    except (ValueError, OSError, ImportError) as error:  # what came with the data, the flags or the machine
        sys.exit(f"horses.py: {error}")
