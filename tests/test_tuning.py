"""The search: grid, refinement, "no CRF", and its filter sharing against one CRF at a time."""

from dataclasses import asdict

import pytest
import torch

from crfnet import dense_crf
from crfnet.metrics import ConfusionMatrix
from crfnet.tuning import Parameters, search

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
    wrong = labels.clone()
    wrong[:10] = 1 - wrong[:10]
    void = labels.clone()
    void[:10] = wrong[:10] = 255
    first, second = (search([image], [logits], [truth], **GRID, rounds=0) for truth in (void, wrong))
    assert first.table == second.table
    other = search([image], [logits], [torch.where(labels == 255, 255, labels)], **GRID, rounds=0)
    assert other.table != first.table


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
        ({"num_iterations": 0}, "num_iterations"),
    ],
)
def test_errors_name_the_argument(change, message):
    image, logits, labels = scene(0)
    with pytest.raises(ValueError, match=message):
        search(**{"images": [image], "logits": [logits], "labels": [labels], **change})
