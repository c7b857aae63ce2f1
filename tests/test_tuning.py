"""The search: grid, refinement, "no CRF", its filter sharing against one CRF at a time, its table, its unaries."""

import csv
import inspect
from dataclasses import asdict, astuple, dataclass, fields

import numpy as np
import pytest
import torch

from crfnet import DenseCRF, dense_crf, tuning
from crfnet.data import Crop, Samples, voc_files, write_scenes
from crfnet.metrics import ConfusionMatrix
from crfnet.models import WithCRF
from crfnet.trials import Parameters
from crfnet.tuning import DEEPLAB_V1_GRID, DEEPLAB_V2_GRID, Grid, search, unaries

GRID = {"bilateral_weight": (2.0, 6.0), "theta_alpha": (6.0,), "theta_beta": (8.0, 20.0)}


def scene(seed: int, *, helpful: bool = True):
    """A bright box on dark ground, and scores that know it only roughly (or, unhelpful, exactly)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(20, 24, dtype=torch.long)
    top, left = (int(torch.randint(2, 8, (), generator=generator)) for _ in range(2))
    labels[top : top + 9, left : left + 11] = 1
    image = (70 + 90 * labels + 6 * torch.randn(20, 24, generator=generator)).expand(3, -1, -1)
    if not helpful:  # the picture says nothing about the labels, the scores everything
        return torch.full((3, 20, 24), 100.0), torch.stack([-labels, labels]) * 0.2, labels
    coarse = torch.nn.functional.avg_pool2d(labels[None, None].float(), 5, 1, 2)[0, 0] - 0.4
    noisy = 3 * coarse + 0.7 * torch.randn(20, 24, generator=generator)
    return image, torch.stack([-noisy, noisy]), labels


def columns(**settings):
    return tuple(zip(*(scene(seed, **settings) for seed in range(3)), strict=True))


def test_best_trial_is_the_best_of_the_table_and_beats_no_crf():
    images, logits, labels = columns()
    found = search(images, logits, labels, **GRID)
    assert found.best.mean_iou == max(trial.mean_iou for trial in found.table)
    assert found.best.mean_iou > found.without_crf.mean_iou + 0.05  # edges are plain to see, scores are not
    assert found.best == found.best_crf


def test_no_crf_is_the_first_trial_and_wins_where_every_crf_harms():
    images, logits, labels = columns(helpful=False)
    found = search(images, logits, labels, **GRID, rounds=0)
    assert found.without_crf.parameters.bilateral_weight == found.without_crf.parameters.spatial_weight == 0
    assert found.without_crf.mean_iou == 1
    assert found.best_crf.mean_iou < 1  # corners are smoothed away
    assert found.best is found.without_crf


def test_ties_go_to_no_crf():
    images = [torch.zeros(3, 6, 6)]
    found = search(images, [torch.stack([torch.ones(6, 6), -torch.ones(6, 6)])], [torch.zeros(6, 6, dtype=torch.long)])
    assert {trial.mean_iou for trial in found.table} == {1.0}
    assert found.best is found.without_crf


def test_scores_are_those_of_one_crf_at_a_time():
    """Sharing structures and channels between weights changes nothing but rounding."""
    images, logits, labels = columns()
    found = search(images, logits, labels, **GRID, spatial_weight=(1.0, 3.0), rounds=1)
    for trial in found.table[1::7]:
        matrix = ConfusionMatrix(2)
        for image, scores, truth in zip(images, logits, labels, strict=True):
            refined = dense_crf(image[None], scores[None], **asdict(trial.parameters), num_iterations=10)
            matrix.add(refined[0].argmax(0), truth)
        # a pixel whose two marginals differ by rounding may fall either way: 2 of 1440, of which class 1 has 297
        assert matrix.mean_iou == pytest.approx(trial.mean_iou, abs=2 / 297)


def test_labels_without_mass_change_nothing():
    """The search leaves out labels that no pixel believes in; more of them must not change the table."""
    images, logits, labels = columns()
    padded = [torch.cat([torch.full((2, 20, 24), -40.0), scores]) for scores in logits]  # true labels become 2 and 3
    plain = search(images, logits, labels, **GRID, rounds=0)
    more = search(images, padded, [truth + 2 for truth in labels], **GRID, rounds=0)
    assert [t.mean_iou for t in more.table] == pytest.approx([t.mean_iou for t in plain.table], abs=2 / 297)


def test_coarse_grid_then_half_steps_around_the_best():
    images, logits, labels = columns()
    found = search(images, logits, labels, **GRID, rounds=2)
    coarse = [trial.parameters for trial in found.table if trial.round == 0][1:]
    assert coarse == [Parameters(w, 6.0, b, 3.0, 1.0) for b in (8.0, 20.0) for w in (2.0, 6.0)]
    centre = max((t for t in found.table[1:] if t.round == 0), key=lambda t: t.mean_iou).parameters
    first = [trial.parameters for trial in found.table if trial.round == 1]
    assert {round(p.bilateral_weight / centre.bilateral_weight, 4) for p in first} == {
        round(3**e, 4) for e in (-0.5, 0, 0.5)
    }
    assert {round(p.theta_beta / centre.theta_beta, 4) for p in first} == {round(2.5**e, 4) for e in (-0.5, 0, 0.5)}
    assert {(p.theta_alpha, p.spatial_weight, p.theta_gamma) for p in first} == {(6.0, 3.0, 1.0)}  # fixed axes
    assert len(first) == 8  # the centre itself is not tried again
    points = [trial.parameters for trial in found.table]
    assert len(set(points)) == len(points)


def test_void_pixels_do_not_count():
    image, logits, labels = scene(0)
    logits[:, :10] = logits[:, :10].flip(0)  # wrong where void, so that it would show
    tables = []
    for void in (255, 9):
        truth = labels.clone()
        truth[:10] = void
        tables.append(search([image], [logits], [truth], **GRID, rounds=0, ignore_index=void).table)
    for trial in tables[0]:
        matrix = ConfusionMatrix(2)
        refined = dense_crf(image[None], logits[None], **asdict(trial.parameters), num_iterations=10)[0]
        matrix.add(refined.argmax(0)[10:], labels[10:])
        # a pixel may fall either way by rounding: 1 of 240, of which class 1 has 33
        assert matrix.mean_iou == pytest.approx(trial.mean_iou, abs=1 / 33)
    assert tables[0] == tables[1]


def test_progress_sees_every_pair_of_bandwidths():
    images, logits, labels = columns()
    seen: list[int] = []

    def watch(groups):
        seen.append(len(groups))
        return groups

    search(images, logits, labels, **GRID, rounds=1, progress=watch)
    assert seen == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "at least one"),
        ({"logits": [torch.zeros(2, 5, 5)]}, r"image 0: wanted \(G, H, W\)"),
        ({"theta_beta": ()}, "theta_beta wants at least one positive value"),
        ({"theta_alpha": (0.0,)}, "theta_alpha wants"),
        ({"theta_alpha": (5.0, float("nan"))}, "theta_alpha wants"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"rounds": -1}, "rounds"),
        ({"labels": [torch.full((20, 24), 255)]}, "a pixel that counts"),
    ],
)
def test_errors_name_the_argument(change, message):
    image, logits, labels = scene(0)
    with pytest.raises(ValueError, match=message):
        search(**{"images": [image], "logits": [logits], "labels": [labels], **change})


# Grid


def test_a_grid_holds_the_defaults_of_the_search():
    defaults = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    assert asdict(Grid()).items() <= defaults.items()
    assert [field.name for field in fields(Grid)][:5] == [field.name for field in fields(Parameters)]


@pytest.mark.parametrize(
    ("grid", "ends"),
    [(DEEPLAB_V1_GRID, ((5, 10), (50, 100), (3, 10))), (DEEPLAB_V2_GRID, ((3, 6), (30, 100), (3, 6)))],
)
def test_the_papers_grids_have_their_ends_and_finer_steps_than_theirs(grid, ends):
    assert (grid.spatial_weight, grid.theta_gamma, grid.num_iterations) == ((3.0,), (3.0,), 10)
    for axis, (low, high), step in zip(astuple(grid)[:3], ends, (1, 10, 1), strict=True):
        assert (axis[0], axis[2]) == (low, high)
        assert axis[1] == float(f"{(low * high) ** 0.5:.2g}")
        assert axis[1] * ((high / low) ** (0.5 * 0.5**grid.rounds) - 1) <= step


def test_a_grid_makes_flags():
    tyro = pytest.importorskip("tyro")

    @dataclass(frozen=True)
    class Config:
        grid: Grid = Grid(theta_alpha=(15.0, 28.0))

    said = tyro.cli(Config, args=["--grid.theta-beta", "4", "8", "--grid.rounds", "2"])
    assert said.grid == Grid(theta_alpha=(15.0, 28.0), theta_beta=(4.0, 8.0), rounds=2)


# Parameters to use


def test_parameters_are_the_best_or_a_crf_without_weight():
    helped, harmed = search(*columns(), **GRID), search(*columns(helpful=False), **GRID)
    assert helped.parameters == helped.best.parameters
    start = harmed.parameters
    assert (start.bilateral_weight, start.spatial_weight) == (0, 0)
    # the middle of the coarse grid, wherever the search went
    assert astuple(start)[1:3] == pytest.approx((6, np.sqrt(8 * 20)), rel=1e-5) and start.theta_gamma == 1
    scores = columns()[1][0][None]
    refined = DenseCRF(2, **asdict(harmed.parameters))(scores, columns()[0][0][None])
    assert torch.equal(refined.argmax(1), scores.argmax(1))


# The table

SHORT = {**GRID, "num_iterations": 2}


def rows_of(path):
    with open(path) as stream:
        assert stream.readline().startswith("# crfnet.tuning.search")
        return list(csv.DictReader(stream))


class Stop(Exception):
    pass


def stopping(after):
    """A progress bar after so many groups of which somebody stops the search."""
    left = [after]

    def progress(groups):
        for group in groups:
            if not left[0]:
                raise Stop
            left[0] -= 1
            yield group

    return progress


@pytest.fixture
def refined(monkeypatch):
    """The points that are tried, one entry an image and point."""
    points: list[Parameters] = []
    real = tuning._refine

    def watch(image, scores, wanted, *rest):
        points.extend(wanted)
        return real(image, scores, wanted, *rest)

    monkeypatch.setattr(tuning, "_refine", watch)
    return points


def test_the_table_on_disk_is_the_one_returned(tmp_path):
    found = search(*columns(), **SHORT, table=tmp_path / "search.csv")
    rows = rows_of(tmp_path / "search.csv")
    assert list(rows[0]) == [*asdict(found.best.parameters), "mean_iou", "round"]
    read = [(*(float(value) for value in list(row.values())[:-1]), int(row["round"])) for row in rows]
    assert read == [(*astuple(trial.parameters), trial.mean_iou, trial.round) for trial in found.table]  # to the bit
    assert rows[0]["bilateral_weight"] == rows[0]["spatial_weight"] == "0.0"
    assert [path.name for path in tmp_path.iterdir()] == ["search.csv"]


@pytest.mark.parametrize("after", [0, 1, 2, 4])  # of 2 groups in the coarse grid and 3 in the round after
def test_a_stopped_search_goes_on_to_the_same_table(tmp_path, refined, after):
    whole = search(*columns(), **SHORT)
    everything = list(refined)
    refined.clear()
    with pytest.raises(Stop):
        search(*columns(), **SHORT, table=tmp_path / "search.csv", progress=stopping(after))
    before = len(rows_of(tmp_path / "search.csv"))
    assert before == 1 + len(refined) / 3 and (before == 1) == (after == 0)
    resumed = search(*columns(), **SHORT, table=tmp_path / "search.csv")
    assert resumed == whole
    assert refined == everything  # each once, before or after
    written = (tmp_path / "search.csv").read_bytes()
    assert search(*columns(), **SHORT, table=str(tmp_path / "search.csv")) == whole and refined == everything
    assert (tmp_path / "search.csv").read_bytes() == written


def test_stopping_twice_loses_nothing(tmp_path, refined):
    path = tmp_path / "search.csv"
    for after in (3, 1, 4):  # the second stops among what is known
        with pytest.raises(Stop):
            search(*columns(), **SHORT, table=path, progress=stopping(after))
    assert len(set(refined)) * 3 == len(refined) == 3 * (len(rows_of(path)) - 1)
    assert search(*columns(), **SHORT, table=path) == search(*columns(), **SHORT)


def test_another_grid_takes_and_keeps_what_it_finds(tmp_path, refined):
    path = tmp_path / "search.csv"
    first = search(*columns(), **SHORT, rounds=0, table=path)
    refined.clear()
    grid = {**SHORT, "theta_beta": (8.0, 40.0)}
    second = search(*columns(), **grid, rounds=0, table=path)
    assert {point.theta_beta for point in refined} == {40.0}
    assert second == search(*columns(), **grid, rounds=0)
    assert len(rows_of(path)) == 1 + 4 + 2
    refined.clear()
    assert search(*columns(), **SHORT, rounds=0, table=path) == first and not refined


@pytest.mark.parametrize(
    "change",
    [
        lambda images, logits, labels: ((images[0] + (torch.arange(24) == 3), *images[1:]), logits, labels, {}),
        lambda images, logits, labels: (images, (*logits[:2], logits[2] * (1 + 2**-20)), labels, {}),
        lambda images, logits, labels: (images, logits, (1 - labels[0], *labels[1:]), {}),
        lambda images, logits, labels: (images[::-1], logits[::-1], labels[::-1], {}),
        lambda images, logits, labels: (images[:2], logits[:2], labels[:2], {}),
        lambda *data: (*data, {"num_iterations": 3}),
        lambda *data: (*data, {"method": "lattice"}),
        lambda *data: (*data, {"ignore_index": 254}),
    ],
)
def test_a_table_of_other_data_is_refused_and_left_alone(tmp_path, change):
    path = tmp_path / "search.csv"
    data = columns()
    search(*data, **SHORT, rounds=0, table=path)
    written = path.read_bytes()
    *other, settings = change(*data)
    with pytest.raises(ValueError, match=r"search\.csv: holds the trials of other images"):
        search(*other, **{**SHORT, **settings}, rounds=0, table=path)
    assert path.read_bytes() == written


def test_values_count_and_not_their_types(tmp_path):
    images, logits, labels = columns()
    images = [image.round().clamp(0, 255) for image in images]
    search(images, logits, labels, **SHORT, rounds=0, table=tmp_path / "a.csv")
    as_bytes, small = [image.byte() for image in images], [truth.byte() for truth in labels]
    search(as_bytes, [scores.double() for scores in logits], small, **SHORT, rounds=0, table=tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: b"", "not a table"),
        (lambda text: text.split(b"\n", 1)[1], "not a table"),  # plain CSV
        (lambda text: b"\x89PNG\r\n\x1a\n" + bytes(99), "not a table"),
        (lambda text: text[:-1], "damaged or edited"),
        (lambda text: text[: len(text) // 2], "damaged or edited"),
        (lambda text: text.replace(b",0\n", b",1\n", 1), "damaged or edited"),
        (lambda text: text.replace(b"0.", b"1.", 1), "damaged or edited"),
        (lambda text: text + b"2.0,6.0,8.0,3.0,1.0,0.99,0\n", "damaged or edited"),
    ],
)
def test_a_damaged_table_is_refused_and_left_alone(tmp_path, damage, said):
    path = tmp_path / "search.csv"
    search(*columns(), **SHORT, rounds=0, table=path)
    bad = damage(path.read_bytes())
    assert bad != path.read_bytes()
    path.write_bytes(bad)
    with pytest.raises(ValueError, match=rf"search\.csv: {said}"):
        search(*columns(), **SHORT, rounds=0, table=path)
    assert path.read_bytes() == bad


def test_a_table_that_cannot_be_written_is_said_before_anything_is_tried(tmp_path, refined):
    with pytest.raises(FileNotFoundError, match=r"search\.csv"):
        search(*columns(), **SHORT, table=tmp_path / "missing" / "search.csv")
    with pytest.raises(IsADirectoryError):
        search(*columns(), **SHORT, table=tmp_path)
    assert not refined


# Unaries


class Strided(torch.nn.Module):
    """Logits at half size, with what has modes: dropout and batch norm."""

    def __init__(self, classes=21):
        super().__init__()
        layers = (
            torch.nn.Conv2d(3, 8, 3, 2, 1),
            torch.nn.BatchNorm2d(8),
            torch.nn.Dropout(),
            torch.nn.Conv2d(8, classes, 1),
        )
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, image):
        return self.layers(image / 255)


class Pair(torch.nn.Module):
    def forward(self, image):
        return image, image


@pytest.fixture
def held_out(tmp_path):
    write_scenes(tmp_path, num_train=1, num_val=7, height=31, width=40)
    return Samples(voc_files(tmp_path, "val"), 21, keep=True)


def test_unaries_are_what_a_network_under_a_crf_gives(held_out):
    torch.manual_seed(0)
    network = Strided().train()
    network.layers[1].eval()  # frozen
    state = {name: value.clone() for name, value in network.state_dict().items()}
    images, logits, labels = unaries(network, held_out)
    assert [module.training for module in network.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert len(images) == len(logits) == len(labels) == 7  # fewer than 100
    silent = WithCRF(network, DenseCRF(21, bilateral_weight=0.0, spatial_weight=0.0)).eval()
    for index, (image, scores, truth) in enumerate(zip(images, logits, labels, strict=True)):
        assert torch.equal(image, held_out[index][0]) and torch.equal(truth, held_out[index][1])
        assert scores.shape == (21, *truth.shape) and not scores.requires_grad
        # the CRF returns log marginals: the logits up to a constant a pixel, to a few roundings of numbers below 8
        with torch.no_grad():
            torch.testing.assert_close(silent(image[None])[0].softmax(0), scores.softmax(0), rtol=1e-5, atol=1e-6)
    assert search(images, logits, labels, rounds=0, num_iterations=1, theta_beta=(5.0,), theta_alpha=(9.0,)).table


def test_the_choice_depends_on_the_seed_alone(held_out):
    network = Strided()
    chosen = [unaries(network, held_out, count=3, seed=seed)[0] for seed in (10, 10, 11, 12)]

    def places(images):
        return [next(k for k in range(7) if torch.equal(held_out[k][0], image)) for image in images]

    first, again, *others = map(places, chosen)
    assert first == again == sorted(set(first)) and len(first) == 3
    assert any(other != first for other in others)
    assert places(unaries(network, held_out, count=3)[0]) == first  # 10 is the default


def test_unaries_errors(held_out):
    network = Strided().train()
    with pytest.raises(ValueError, match="count must be a whole number"):
        unaries(network, held_out, count=0)
    with pytest.raises(ValueError, match="at least one"):
        unaries(network, Samples([], 21))
    held_out.transform = Crop((50, 50))
    with pytest.raises(ValueError, match=r"sample 0: wanted .*no padded pixels, got \(50, 50\) and 1260"):
        unaries(network, held_out)
    held_out.transform = None
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        unaries(Pair(), held_out)
    assert network.training
