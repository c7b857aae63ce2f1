"""The training loop: killed and resumed to the same bits, several processes as one, every setting against its formula.

Runs that are killed, and processes that work together, come from a fork server that has imported torch already.
"""

import csv
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slim import make
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from crfnet import DenseCRF, checkpoints, training
from crfnet.data import Crop, Samples
from crfnet.evaluation import evaluate
from crfnet.losses import full_resolution, multi_scale_parts, through_crf
from crfnet.models import (
    BackboneDeepLab,
    DeepLabV2ResNet,
    FCNGoogLeNet,
    MultiScale,
    WithCRF,
)
from crfnet.optim import parameter_groups, poly_policy, step_policy
from crfnet.order import loader
from crfnet.processes import on_first
from crfnet.training import Run, Settings, train

COUNT, CLASSES = 5, 3
SIZE = (9, 8)


def write_samples(folder: Path, *, size: tuple[int, int] = (12, 11), void: tuple[float, ...] = ()) -> None:
    """Pictures whose label is their brightest colour; of image k a fraction ``void[k]`` carries no label."""
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        picture = rng.integers(0, 256, (size[0] // 3 + 1, size[1] // 3 + 1, 3), dtype=np.uint8)
        picture = picture.repeat(3, 0).repeat(3, 1)[: size[0], : size[1]]
        labels = picture.argmax(2).astype(np.uint8)
        fraction = void[index] if void else 0.1
        labels[: round(fraction * size[0])] = 255
        Image.fromarray(picture).save(folder / f"{index}.png")
        Image.fromarray(labels).save(folder / f"{index}_labels.png")


def read_samples(folder: Path, *, crop: bool = True) -> Samples:
    files = [(folder / f"{index}.png", folder / f"{index}_labels.png") for index in range(COUNT)]
    return Samples(files, CLASSES, transform=Crop(SIZE, scale=(0.7, 1.4)) if crop else None, seed=3, keep=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_samples(folder)
    return folder


class Tiny(nn.Module):
    """Two convolutions, with dropout between and batch norm where it is wanted."""

    def __init__(self, *, dropout: float = 0.5, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Conv2d(8, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.norm(self.conv(image / 128 - 1)).relu()))


def with_crf(*, dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(1)
    crf = DenseCRF(CLASSES, theta_alpha=8.0, theta_beta=30.0, num_iterations=1, num_iterations_eval=2)
    return WithCRF(Tiny(dropout=dropout), crf)


def tiny(**settings) -> nn.Module:
    torch.manual_seed(1)
    return Tiny(**settings)


def sgd(network: nn.Module, learning_rate: float = 0.02, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(parameter_groups(network, learning_rate, **settings), momentum=0.9)


def constant(iteration: int) -> float:
    return 1.0


def train_plainly(
    network: nn.Module, samples: Samples, settings: Settings, *, rate: float = 0.02, loss=full_resolution, **more
):
    """As `train`, with plain SGD at a constant rate."""
    optimizer = torch.optim.SGD(network.parameters(), rate)
    return train(network, samples, loss, optimizer, constant, settings, log=lambda text: None, **more)


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed

EVERY = 3
LONG = Settings(
    18, 2, accumulate=2, seed=5, clip_crf=0.5, average=0.8, checkpoint_every=EVERY, validate_every=2, select="mean_iou"
)


def long_run(root: Path, settings: Settings, *, device: str = "cpu", **more) -> tuple[nn.Module, Run]:
    """With all that a resumed run has to bring back: momentum, average, dropout, schedule, the best, half a log row."""
    network, samples = with_crf().to(device), read_samples(root)
    optimizer = sgd(network, crf_weights=0.05)
    plain = read_samples(root, crop=False)
    plain = Samples(plain.files[:2], CLASSES, keep=True)
    more = {
        "log": lambda text: None,
        "validate": lambda judged: {"mean_iou": evaluate(judged, plain, device=device)["mean_iou"]},
    } | more
    run = train(network, samples, through_crf, optimizer, poly_policy(18), settings, **more)
    return network, run


def outcome(network: nn.Module, run: Run) -> tuple[dict, list[dict], tuple]:
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]
    return network.state_dict(), rows, (run.best["iteration"], run.best["score"])


def work(root: Path, folder: Path, workers: int, done, kill_at: str) -> None:
    """One life of a run; ``kill_at`` names a moment of writing a checkpoint at which it kills itself."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of readers: a server of their own would import torch again

    def count(iterations, left):
        for iteration in iterations:
            done.value = iteration
            yield iteration

    if kill_at:
        module, _, name = kill_at.partition(".")
        target = {"os": os, "torch": torch, "Path": Path}[module]
        real, calls = getattr(target, name), [0]

        def killing(*arguments, **settings):
            calls[0] += 1
            if module == "torch":  # half of the file is there
                arguments[1].write(b"PK" + bytes(2000))
                arguments[1].flush()
            if calls[0] == (1 if module == "torch" else 2):  # the first is of log.csv
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        setattr(target, name, killing)
    network, run = long_run(root, replace(LONG, workers=workers), folder=folder, resume=True, progress=count)
    torch.save(outcome(network, run), folder / "outcome")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are killed have: in which order sums are taken depends on it, and so do the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", __name__])  # the first for the optimisers
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def uninterrupted(root):
    network, run = long_run(root, replace(LONG, checkpoint_every=0))
    return outcome(network, run)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_loses_an_interval_at_most_and_ends_with_the_same_bits(
    root, tmp_path, server, uninterrupted, workers
):
    moments = random.Random(workers)
    # while the file is written, before it reaches the disk, before and after it takes its name
    stages = ["torch.save", "os.fsync", "os.replace", "Path.unlink"] if workers == 0 else []
    killed, iteration = 0, 0
    for attempt in range(30):
        done, stage = server.Value("i", -1), stages.pop(0) if stages else ""
        life = server.Process(target=work, args=(root, tmp_path, workers, done, stage))
        life.start()
        if not stage and attempt < 8:
            until = iteration + moments.randint(0, 3)
            while done.value < until and life.is_alive():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            life.kill()
        life.join(600)
        assert not life.is_alive()
        # all checkpoints on disk are whole (a warning would be an error), and the newest is of the last interval
        saved = checkpoints.newest(tmp_path)
        iteration = max(iteration, done.value)
        assert (0 if saved is None else saved["iteration"]) >= iteration // EVERY * EVERY
        if life.exitcode == 0:
            break
        assert life.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 3
    network, rows, best = torch.load(tmp_path / "outcome", weights_only=True)
    assert rows == uninterrupted[1] and best == uninterrupted[2]
    assert same(network, uninterrupted[0])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"outcome", "log.csv", "iteration-00000015.pt", "iteration-00000018.pt"}
    with open(tmp_path / "log.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [int(row["iteration"]) for row in table] == list(range(0, 19, 2))
    assert list(table[0])[:4] == ["iteration", "loss", "learning_rate", "seconds"]
    assert [float(row["loss"]) for row in table[1:]] == [row["loss"] for row in rows[1:]]  # the start has none
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds)


def test_a_run_that_is_done_gives_its_result_again_and_may_go_on(root, tmp_path, uninterrupted):
    settings = replace(LONG, iterations=12)
    long_run(root, settings, folder=tmp_path)
    network, run = long_run(root, settings, folder=tmp_path, resume=True)
    assert [row["iteration"] for row in run.history] == list(range(0, 13, 2))
    assert same(network.state_dict(), run.best["network"]) and not network.training
    assert same(outcome(*long_run(root, LONG, folder=tmp_path, resume=True))[0], uninterrupted[0])


@pytest.mark.gpu
def test_on_a_gpu_a_resumed_run_has_the_same_bits(root, tmp_path):
    wanted = outcome(*long_run(root, LONG, device="cuda", folder=tmp_path / "whole"))
    parts = tmp_path / "parts"
    long_run(root, replace(LONG, iterations=12), device="cuda", folder=parts)
    torch.cuda.manual_seed(99)  # of the dropout, as another process would have it
    found = outcome(*long_run(root, LONG, device="cuda", folder=parts, resume=True))
    assert found[1:] == wanted[1:] and same(found[0], wanted[0])


def test_a_damaged_checkpoint_costs_one_more_interval_and_nothing_else(root, tmp_path, uninterrupted):
    long_run(root, replace(LONG, iterations=12), folder=tmp_path)
    newest, said = checkpoints.existing(tmp_path)[-1], []
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="00000012.pt: cannot be read and is passed over"):
        result = outcome(*long_run(root, LONG, folder=tmp_path, resume=True, log=said.append))
    assert said[0] == "goes on from iteration 9"
    assert result[1:] == uninterrupted[1:] and same(result[0], uninterrupted[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "batch_size 2 then and 4 now"),
        ({"accumulate": 1}, "accumulate 2 then and 1 now"),
        ({"seed": 6}, "seed 5 then and 6 now"),
        ({"clip_crf": None}, "clip_crf 0.5 then and None now"),
        ({"average": 0.0}, "average 0.8 then and 0.0 now"),
        ({"freeze_norm": True}, "freeze_norm False then and True now"),
        ({"select": ""}, "select mean_iou then and  now"),
        ({"autocast": torch.bfloat16}, "autocast None then and torch.bfloat16 now"),
        ({"iterations": 2}, "iterations 3 done and 2 wanted"),
    ],
)
def test_other_settings_do_not_resume(root, stopped, change, message):
    with pytest.raises(ValueError, match=f"same settings, got {message}"):
        long_run(root, replace(LONG, **change), folder=stopped, resume=True)


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory) -> Path:
    """A run that got to iteration 3."""
    folder = tmp_path_factory.mktemp("stopped")
    long_run(root, replace(LONG, iterations=3), folder=folder)
    return folder


def test_another_network_optimizer_schedule_or_data_do_not_resume(root, stopped):
    network, samples = with_crf(), read_samples(root)

    def resume(network=network, samples=samples, optimizer=None, schedule=poly_policy(18)):  # noqa: B008
        optimizer = sgd(network, crf_weights=0.05) if optimizer is None else optimizer
        train(network, samples, through_crf, optimizer, schedule, LONG, folder=stopped, resume=True,
              validate=lambda judged: {"mean_iou": 0.0})  # fmt: skip

    with pytest.raises(ValueError, match="optimizer SGD then and AdamW now"):
        resume(optimizer=torch.optim.AdamW(parameter_groups(network, 0.02)))
    with pytest.raises(ValueError, match="optimizer's groups .*'initial_lr': 0.02.* now"):
        resume(optimizer=sgd(network, 0.01, crf_weights=0.05))
    with pytest.raises(ValueError, match="learning rate 0.0169.* then and 0.02 by the schedule now, at iteration 3"):
        resume(schedule=step_policy(10))
    with pytest.raises(ValueError, match="number of samples 5 then and 4 now"):
        resume(samples=Samples(samples.files[:4], CLASSES, seed=3))
    with pytest.raises(ValueError, match="seed of the samples 3 then and 0 now"):
        resume(samples=Samples(samples.files, CLASSES))
    with pytest.raises(ValueError, match="their names' digest"):
        resume(samples=Samples(samples.files[::-1], CLASSES, seed=samples.seed, transform=samples.transform))
    with pytest.raises(ValueError, match=r"transform .* then and Crop\(size=\(4, 4\), .* now"):
        resume(samples=Samples(samples.files, CLASSES, seed=samples.seed, transform=Crop((4, 4))))
    moved = [(f"/elsewhere/{image.name}", f"/elsewhere/{labels.name}") for image, labels in samples.files]
    other = with_crf()
    with pytest.raises(OSError, match="elsewhere"):  # it went on, and reads there
        resume(samples=Samples(moved, CLASSES, seed=samples.seed, transform=samples.transform), network=other)
    other.network.classifier = nn.Conv2d(8, CLASSES, 3, padding=1)
    with pytest.raises(ValueError, match="(?s)checkpoint must fit the network: .*classifier"):
        resume(network=other)


def test_a_new_run_leaves_the_checkpoints_of_another_alone(root, stopped):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(ValueError, match="iteration-00000003.pt is of a run before: resume goes on"):
        long_run(root, LONG, folder=stopped)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_full_disk_ends_the_run_and_leaves_its_checkpoints(root, tmp_path, monkeypatch, uninterrupted):
    real = torch.save

    def save(state, stream):
        if state["iteration"] > 6:
            stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, stream)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        long_run(root, LONG, folder=tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-00000003.pt", "iteration-00000006.pt", "log.csv"]
    assert same(outcome(*long_run(root, LONG, folder=tmp_path, resume=True))[0], uninterrupted[0])


# ---------------------------------------------------------------------------------------------------------------------
# the order of images


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_batches_do_not_depend_on_the_workers_nor_touch_the_random_numbers(root):
    samples, random_state = read_samples(root), torch.get_rng_state()
    alone, helped = (list(loader(samples, 2, seed=1, start=2, stop=8, workers=w)) for w in (0, 2))
    assert len(alone) == len(helped) == 6
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


# ---------------------------------------------------------------------------------------------------------------------
# several processes


class Shrink(nn.Module):
    """Stride 8, features at every 8th pixel: enough for three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).tanh()


def three_scales() -> nn.Module:
    torch.manual_seed(2)
    return MultiScale(BackboneDeepLab(Shrink(), CLASSES, rates=(1, 2)))


def scales_loss(network: nn.Module, batch) -> list:
    return multi_scale_parts(network(batch[0], upsample=False), batch[1])


CASES = {
    "mean": (partial(tiny, dropout=0.0), full_resolution, {}),
    "sum": (partial(tiny, dropout=0.0), partial(full_resolution, normalize=False), {}),
    "accumulated": (partial(tiny, dropout=0.0), full_resolution, {"accumulate": 3}),
    "crf": (partial(with_crf, dropout=0.0), through_crf, {"accumulate": 2, "clip_crf": 0.01}),
    "scales": (three_scales, scales_loss, {"accumulate": 2}),
}


def gradients(root: Path, case: str) -> tuple[list[Tensor], float]:
    build, loss, settings = CASES[case]
    network = build()
    run = train_plainly(network, read_samples(root, crop=False), Settings(1, 4, seed=1, **settings), loss=loss)
    return [p.grad for p in network.parameters()], run.history[0]["loss"]


def together(number: int, processes: int, root: Path, uneven: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), processes)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=processes)
    found: dict = {case: gradients(uneven, case) for case in CASES}
    found["scores"] = evaluate(tiny().eval(), read_samples(uneven, crop=False))
    short = replace(LONG, iterations=7, checkpoint_every=3)
    lines: list[str] = []
    found["whole"] = outcome(*long_run(root, short, folder=folder / "whole"))
    found["drawn"] = torch.rand(3)
    with pytest.MonkeyPatch.context() as patch:  # the first process still writes while the second would go on
        write = checkpoints.write
        patch.setattr(checkpoints, "write", lambda *a, **s: (time.sleep(0.2 if a[1] == 4 else 0), write(*a, **s)))
        long_run(root, replace(short, iterations=4), folder=folder / "halves")
    found["halves"] = outcome(*long_run(root, short, folder=folder / "halves", resume=True))
    own = folder / f"own-{number}"  # a folder that the other does not see: only the first process writes
    train_plainly(tiny(), read_samples(root), Settings(1, 2, checkpoint_every=1), folder=own)
    for settings, network, resume in (
        (Settings(1, 3), tiny(), False),
        (Settings(1, 2), tiny(norm=True), False),
        (Settings(1, 2), tiny(), True),
    ):
        try:
            train_plainly(network, read_samples(root), settings, folder=own if resume else None, resume=resume)
        except ValueError as error:
            lines.append(str(error).replace(str(own), "own"))
    found["errors"] = lines
    frozen = tiny(norm=True, dropout=0.0)
    train_plainly(frozen, read_samples(uneven, crop=False), Settings(1, 4, seed=1, freeze_norm=True))
    found["frozen"] = [p.grad for p in frozen.parameters()]
    found["on first"] = on_first(lambda: f"made by {number}")
    try:
        on_first(lambda: [][number])
    except IndexError as error:  # in every process, or the others would wait for ever
        found["raised"] = str(error)
    torch.save(found, folder / f"found-{number}")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Pictures of 33 x 33 pixels, of which one carries all labels, others few or none."""
    folder = tmp_path_factory.mktemp("uneven")
    write_samples(folder, size=(33, 33), void=(0.0, 0.97, 1.0, 0.6, 0.9))
    return folder


@pytest.fixture(scope="module")
def found(root, uneven, server, tmp_path_factory) -> list[dict]:
    """What two processes came to, one of them each."""
    if not distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("together")
    lives = [server.Process(target=together, args=(number, 2, root, uneven, folder)) for number in range(2)]
    for life in lives:
        life.start()
    for life in lives:
        life.join(600)
        life.kill()  # or one that waits for another would stay
    assert [life.exitcode for life in lives] == [0, 0]
    return [torch.load(folder / f"found-{number}", weights_only=True) for number in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_and_the_loss_of_one(found, uneven, case):
    wanted, loss = gradients(uneven, case)
    for process in found:
        got, its_loss = process[case]
        assert its_loss == pytest.approx(loss, rel=1e-5)
        for one, other in zip(got, wanted, strict=True):  # sums of float32 in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_two_processes_freeze_batch_norm_like_one(found, uneven):
    network = tiny(norm=True, dropout=0.0)
    train_plainly(network, read_samples(uneven, crop=False), Settings(1, 4, seed=1, freeze_norm=True))
    for one, other in zip(found[0]["frozen"], network.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5 * float(other.grad.abs().max()))


def test_what_the_first_process_makes_or_raises_all_get(found):
    assert [process["on first"] for process in found] == ["made by 0"] * 2
    assert [process["raised"] for process in found] == ["list index out of range"] * 2
    assert on_first(lambda: 3) == 3


def test_two_processes_get_the_scores_of_one(found, uneven):
    scores = evaluate(tiny().eval(), read_samples(uneven, crop=False))  # five images, three of them the first's
    assert found[0]["scores"] == found[1]["scores"] == scores
    assert 0 < scores["mean_iou"] < 1


def test_two_processes_resume_to_the_same_bits_each_with_its_own_dropout(found):
    for process in found:
        assert process["whole"][1:] == process["halves"][1:]
        assert same(process["whole"][0], process["halves"][0])
    assert same(found[0]["whole"][0], found[1]["whole"][0])
    assert not torch.equal(found[0]["drawn"], found[1]["drawn"])


def test_two_processes_refuse_what_they_cannot_share(found):
    assert found[0]["errors"] == found[1]["errors"]
    shares, norm, folders = found[0]["errors"]
    assert folders == "all processes must see the same checkpoints in own, got those of iterations [1, 0]"
    assert shares == "batch_size must be a multiple of the 2 processes, got 3"
    assert norm.startswith("batch norm must see the batches of all processes, but torch's SyncBatchNorm runs on no CPU")


def test_batch_norm_that_learns_is_shared_and_frozen_norms_stay():
    device = torch.device("cuda")  # named alone: converting needs none
    frozen = make(DeepLabV2ResNet)
    kinds = [type(module) for module in frozen.modules()]
    training.share_norm(frozen, device)
    assert [type(module) for module in frozen.modules()] == kinds

    network = make(lambda: FCNGoogLeNet(style="torchvision"))
    names, parameters = list(network.state_dict()), list(network.parameters())
    image = torch.rand(1, 3, 40, 40) * 255
    with torch.no_grad():
        before = network(image)
        training.share_norm(network, device)
        assert torch.equal(network(image), before)
    assert list(network.state_dict()) == names
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))  # the optimiser's
    norms = [type(module) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 57 and set(norms) == {nn.SyncBatchNorm}

    class WithReLU(nn.BatchNorm2d):  # as timm's
        pass

    with pytest.raises(ValueError, match="WithReLU is not torch's own"):
        training.share_norm(nn.Sequential(WithReLU(3)), device)


# ---------------------------------------------------------------------------------------------------------------------
# what an iteration does


def batch_of(samples: Samples, settings: Settings) -> list:
    count = settings.iterations * settings.accumulate
    return list(loader(samples, settings.batch_size, seed=settings.seed, start=0, stop=count))


def test_accumulated_gradients_are_the_mean_of_the_batches_as_caffes_iter_size(root):
    samples, settings = read_samples(root), Settings(1, 2, accumulate=3)
    network = tiny(dropout=0.0)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    losses = []
    for image, labels, _ in batch_of(samples, settings):  # each batch by its own labelled pixels
        losses.append(F.cross_entropy(network(image), labels, ignore_index=255) / 3)
    wanted = torch.autograd.grad(sum(losses), list(network.parameters()))
    run = train_plainly(network, samples, settings, rate=0.5)
    assert run.history[0]["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    for (name, parameter), gradient in zip(network.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), start[name] - 0.5 * gradient, rtol=1e-5, atol=1e-6)


def test_the_rate_follows_the_schedule_from_the_first_iteration_on(root):
    network, used = tiny(), []
    optimizer = sgd(network)
    optimizer.register_step_pre_hook(lambda *_: used.append([group["lr"] for group in optimizer.param_groups]))
    run = train(network, read_samples(root), full_resolution, optimizer, step_policy(2), Settings(5, validate_every=1),
                log=lambda text: None)  # fmt: skip
    wanted = [1, 1, 0.1, 0.1, 0.01]
    assert [group["name"] for group in optimizer.param_groups] == ["trunk", "trunk biases", "head", "head biases"]
    assert np.allclose(used, [[0.02 * f, 0.04 * f, 0.2 * f, 0.4 * f] for f in wanted], rtol=1e-12)
    assert [row["learning_rate"] for row in run.history] == [rates[0] for rates in used]


def test_only_the_crf_is_clipped_and_to_the_norm_that_is_asked_for(root):
    grads = {}
    for clip in (None, 0.01, 1e6):
        network = with_crf(dropout=0.0)
        train_plainly(
            network, read_samples(root), Settings(1, 2, clip_crf=clip), loss=partial(through_crf, normalize=False)
        )
        grads[clip] = {name: p.grad for name, p in network.named_parameters()}
    crf = [name for name in grads[None] if name.startswith("crf.")]
    free = torch.stack([grads[None][name].norm() for name in crf]).norm()
    assert free > 0.01 and len(crf) == 3
    for name, gradient in grads[None].items():
        assert torch.equal(grads[1e6][name], gradient)
        # the factor is clip / (norm + 1e-6)
        wanted = gradient * 0.01 / (free + 1e-6) if name in crf else gradient
        torch.testing.assert_close(grads[0.01][name], wanted, rtol=1e-5, atol=0)


def test_the_average_is_exponential_and_is_what_is_judged_and_what_remains(root):
    network, seen, judged = tiny(), [], []

    def validate(network_judged):
        assert not any(module.training for module in network_judged.modules())
        seen.append(network.classifier.weight.detach().clone())
        judged.append(network_judged.classifier.weight.detach().clone())
        return {}

    train_plainly(network, read_samples(root), Settings(4, 2, average=0.75, validate_every=1), validate=validate)
    wanted = seen[0]  # the first average is the first parameters
    for value, got in zip(seen, judged, strict=True):
        wanted = wanted if value is seen[0] else 0.75 * wanted + 0.25 * value
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(network.classifier.weight, judged[-1]) and not torch.equal(judged[-1], seen[-1])
    assert not network.training


def test_validation_runs_the_crf_as_in_evaluation(root):
    network, seen = with_crf(), []

    def validate(judged):
        image = read_samples(root, crop=False)[0][0][None]
        plain = DenseCRF(CLASSES, theta_alpha=8.0, theta_beta=30.0, num_iterations=9, num_iterations_eval=2).eval()
        plain.load_state_dict(judged.crf.state_dict())
        with torch.no_grad():
            seen.append(torch.equal(judged(image), plain(judged.network(image), image)))
        return {}

    train_plainly(network, read_samples(root), Settings(2, validate_every=1), validate=validate)
    assert seen == [True, True]


def test_frozen_norm_keeps_its_statistics_and_learns_its_scale(root):
    for freeze in (True, False):
        network = tiny(norm=True)
        train_plainly(network, read_samples(root), Settings(2, 2, freeze_norm=freeze))
        assert torch.equal(network.norm.running_mean, torch.zeros(8)) == freeze
        assert int(network.norm.num_batches_tracked) == (0 if freeze else 2)
        assert not torch.equal(network.norm.weight, torch.ones(8))


def test_autocast_computes_in_bfloat16_and_sums_the_loss_in_float32(root):
    kinds = []

    def loss(network, batch):
        kinds.append(network(batch[0]).dtype)
        parts = full_resolution(network, batch, normalize=False)
        kinds.append(parts[0][0].dtype)
        return parts

    losses = []
    for autocast in (None, torch.bfloat16):
        network = tiny(dropout=0.0)
        run = train_plainly(network, read_samples(root), Settings(3, 2, autocast=autocast), rate=1e-4, loss=loss)
        losses.append(run.history[-1]["loss"])
        assert all(p.dtype == p.grad.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())
    assert kinds == [torch.float32, torch.float32] * 3 + [torch.bfloat16, torch.float32] * 3
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)  # 8 bits, over a few layers
    joint = with_crf()
    train_plainly(joint, read_samples(root), Settings(2, 2, autocast=torch.bfloat16, clip_crf=1.0), loss=through_crf)
    assert all(p.grad.abs().max() > 0 for p in joint.parameters())


def test_the_best_validation_comes_back(root):
    network, scores, states = tiny(), iter([np.float64("nan"), 0.1, 0.2, 0.5, 0.4, 0.5]), []

    def validate(judged):
        states.append({name: value.clone() for name, value in judged.state_dict().items()})
        return {"mean_iou": next(scores), "other": torch.tensor(1.0)}

    run = train_plainly(
        network, read_samples(root), Settings(5, validate_every=1, select="mean_iou"), validate=validate
    )
    assert (run.best["iteration"], run.best["score"]) == (3, 0.5)  # the first of equals; NaN is no best
    assert same(network.state_dict(), states[3]) and not same(states[3], states[5])
    assert all(type(row["mean_iou"]) is float for row in run.history)
    with pytest.raises(ValueError, match=r"select must be one of the metrics \['mean_iou'\], got 'iou'"):
        train_plainly(tiny(), read_samples(root), Settings(1, select="iou"), validate=lambda judged: {"mean_iou": 1.0})


def guarded(network, root, selected, guard):
    scores, lines = iter(zip(selected, guard, strict=True)), []
    run = train(
        network, read_samples(root), full_resolution, torch.optim.SGD(network.parameters(), 0.02), constant,
        Settings(3, validate_every=1, select="mean_iou", guard="train_iou"), log=lines.append,
        validate=lambda judged: dict(zip(("mean_iou", "train_iou"), next(scores), strict=True)),
    )  # fmt: skip
    return run, [line for line in lines if "not to be selected" in line]


def test_what_falls_below_the_start_by_the_guard_is_not_selected(root):
    """CRF-RNN's fine-tuning that collapses: better on the held-out images by chance, worse on the training images."""
    network = tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run, refused = guarded(network, root, [0.5, 0.9, 0.6, 0.7], [0.6, 0.59, 0.6, 0.2])
    assert run.best["iteration"] == 2 and len(refused) == 2
    assert refused[0] == "not to be selected: train_iou 0.5900, below 0.6000 at the start"
    network = tiny()
    run, refused = guarded(network, root, [0.5, 0.9, 0.9, 0.9], [0.6, 0.1, float("nan"), 0.2])
    assert run.best["iteration"] == 0 and len(refused) == 3 and same(network.state_dict(), before)
    with pytest.raises(ValueError, match="guard must be a number at the start, train_iou is NaN"):
        guarded(tiny(), root, [0.5] * 4, [float("nan")] * 4)
    with pytest.raises(ValueError, match="guard 'train_iou' needs select"):
        Settings(1, guard="train_iou")
    with pytest.raises(ValueError, match=r"guard must be one of the metrics \['mean_iou'\], got 'iou'"):
        train_plainly(tiny(), read_samples(root), Settings(1, select="mean_iou", guard="iou"),
            validate=lambda judged: {"mean_iou": 1.0})  # fmt: skip


def test_a_crf_alone_learns_on_a_frozen_network(root):
    whole = with_crf()
    network = nn.Sequential(whole.network, nn.BatchNorm2d(CLASSES))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    both = WithCRF(network, whole.crf, frozen=True)
    train_plainly(both, read_samples(root), Settings(2, 2), rate=1.0, loss=through_crf)
    assert same(network.state_dict(), before)  # nor did batch norm's statistics move
    assert not any(p.requires_grad for p in network.parameters()) and all(
        p.grad is not None for p in whole.crf.parameters()
    )
    both.train()
    assert not network[0].dropout.training and not network[1].training and both.crf.training


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(root, tmp_path):
    calls = []

    def loss(network, batch):
        calls.append(1)
        (total, count), *_ = full_resolution(network, batch)
        return [(total * (torch.nan if len(calls) == 5 else 1.0), count)]

    network, lines = tiny(), []
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    with pytest.raises(ValueError, match="loss must be finite, got nan at iteration 5: a smaller learning rate"):
        train(network, read_samples(root), loss, optimizer, constant, Settings(9, 2, checkpoint_every=2),
              folder=tmp_path, log=lines.append)  # fmt: skip
    saved = checkpoints.newest(tmp_path)
    assert saved["iteration"] == 4 and len(calls) == 5
    assert same(dict(network.state_dict()), dict(saved["network"]))  # the step was not taken


def test_parameters_that_are_not_finite_reach_no_checkpoint(root, tmp_path):
    calls = []

    def loss(network, batch):
        calls.append(1)
        (total, count), *_ = full_resolution(network, batch)
        if len(calls) == 4:  # 0, with an infinite slope times 0: a finite loss without a finite gradient
            total = total + (0 * network.classifier.bias.sum()).sqrt()
        return [(total, count)]

    with pytest.raises(ValueError, match="parameters must be finite, got others at iteration 4, in classifier.bias"):
        train_plainly(tiny(), read_samples(root), Settings(9, 2, checkpoint_every=2), loss=loss, folder=tmp_path)
    assert checkpoints.newest(tmp_path)["iteration"] == 2


def test_parameters_that_are_not_finite_are_said_without_checkpoints_too(root):
    def loss(network, batch):
        (total, count), *_ = full_resolution(network, batch)
        return [(total + (0 * network.classifier.bias.sum()).sqrt(), count)]

    with pytest.raises(ValueError, match="parameters must be finite, got others at iteration 1, in classifier.bias"):
        train_plainly(tiny(), read_samples(root), Settings(1, 2), loss=loss)


def test_settings_that_cannot_be_say_so(root):
    for wrong, message in (
        ({"iterations": 0}, "at least 1"),
        ({"accumulate": 0}, "at least 1"),
        ({"keep": 0}, "at least 1"),
        ({"validate_every": -1}, "0 or more"),
        ({"clip_crf": 0.0}, "clip_crf must be positive"),
        ({"average": 1.0}, r"average must lie in \[0, 1\)"),
        ({"autocast": torch.float16}, "autocast must be torch.bfloat16 or None"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**{"iterations": 1, **wrong})
    samples = read_samples(root)
    with pytest.raises(ValueError, match="select 'mean_iou' needs validate"):
        train_plainly(tiny(), samples, Settings(1, select="mean_iou"))
    with pytest.raises(ValueError, match="need a folder"):
        train_plainly(tiny(), samples, Settings(1), resume=True)
    with pytest.raises(ValueError, match="samples must be at least one"):
        train_plainly(tiny(), Samples([], CLASSES), Settings(1))


# ---------------------------------------------------------------------------------------------------------------------
# the log


def test_the_log_has_a_row_an_interval_with_or_without_validation(root, tmp_path):
    lines: list[str] = []
    network = tiny()
    optimizer = torch.optim.SGD(network.parameters(), 0.02)
    losses = []

    def loss(network, batch):
        ((total, count),) = full_resolution(network, batch)
        losses.append(total.item() / count.item())
        return [(total, count)]

    run = train(network, read_samples(root), loss, optimizer, constant, Settings(5, 2, validate_every=2),
                folder=tmp_path / "new", log=lines.append)  # fmt: skip
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["log.csv"]  # no checkpoints were asked for
    with open(tmp_path / "new" / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["iteration", "loss", "learning_rate", "seconds"]
    assert [int(row["iteration"]) for row in rows] == [2, 4, 5]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [float(row["loss"]) for row in rows] == pytest.approx(means, rel=1e-5)
    assert len(lines) == len(run.history) == 3 and lines[0].startswith("iteration 2, loss ")


def test_tqdm_shows_the_iterations_left(root, tmp_path):
    tqdm = pytest.importorskip("tqdm").tqdm
    bars = []

    def progress(iterations, left):
        bars.append(tqdm(iterations, total=left, file=open(os.devnull, "w"), leave=False))  # noqa: SIM115
        yield from bars[-1]
        bars[-1].fp.close()

    for iterations in (2, 5):
        settings = Settings(iterations, 2, checkpoint_every=5)
        train_plainly(tiny(), read_samples(root), settings, progress=progress, folder=tmp_path, resume=True)
    assert [(bar.total, bar.n) for bar in bars] == [(2, 2), (3, 3)]


def test_tensorboard_gets_the_same_rows(root, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for iterations in (3, 6):
        settings = Settings(iterations, 2, validate_every=1, checkpoint_every=10, tensorboard=True)
        run = train_plainly(
            tiny(), read_samples(root), settings, folder=tmp_path, resume=True, validate=lambda judged: {"score": 0.5}
        )
    board = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "learning_rate", "seconds", "score"} <= set(board.Tags()["scalars"])
    events = board.Scalars("loss")
    assert [event.step for event in events] == [row["iteration"] for row in run.history] == list(range(1, 7))
    assert [event.value for event in events] == pytest.approx([row["loss"] for row in run.history], rel=1e-6)


def test_tensorboard_that_is_missing_is_an_error_before_anything_is_trained(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install crfnet\[tensorboard\]"):
        train_plainly(tiny(), read_samples(root), Settings(1, tensorboard=True), folder=tmp_path, loss=None)
    with pytest.raises(ValueError, match="need a folder"):
        train_plainly(tiny(), read_samples(root), Settings(1, tensorboard=True))


def test_it_learns_which_colour_is_the_brightest(root):
    network = tiny(dropout=0.0)
    run = train(network, read_samples(root), full_resolution, sgd(network), poly_policy(60),
                Settings(60, 5, validate_every=10), log=lambda text: None)  # fmt: skip
    assert run.history[-1]["loss"] < 0.6  # log(3) = 1.1 by chance
