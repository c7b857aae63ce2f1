"""The piecewise stage that several recipes share: a CRF is searched for a network that stays as it is."""

from pathlib import Path

import numpy as np
import pytest
from threshold import Threshold, rectangles

from crfnet.data import Samples
from crfnet.evaluation import evaluate
from crfnet.piecewise import fit
from crfnet.tuning import Grid


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Samples:
    return rectangles(tmp_path_factory.mktemp("samples"))


def test_a_fitted_crf_is_better_where_it_was_fitted_and_leaves_the_network(samples, tmp_path):
    network = Threshold()
    both, found = fit(network, samples, Grid((3.0,), (10.0, 20.0), (30.0, 60.0), rounds=0), tmp_path, count=4)
    assert found.best.mean_iou > found.without_crf.mean_iou + 0.05
    assert both.network is not network and not any(p.requires_grad for p in both.crf.parameters())
    chosen = [samples.files[k] for k in sorted(np.random.default_rng(10).permutation(5)[:4])]
    assert evaluate(both, Samples(chosen, 2))["mean_iou"] == pytest.approx(found.best.mean_iou, abs=0.002)
    fewer, found = fit(network, samples, Grid((3.0,), (10.0,), (30.0,), rounds=0, num_iterations=1), tmp_path, count=4)
    assert evaluate(fewer, Samples(chosen, 2))["mean_iou"] == pytest.approx(found.best_crf.mean_iou, abs=0.002)
    assert (tmp_path / "search.png").stat().st_size > 0


def test_a_search_goes_on_only_where_asked(samples, tmp_path):
    grid = Grid((3.0,), (10.0,), (30.0,), rounds=0)
    fit(Threshold(), samples, grid, tmp_path)
    before = (tmp_path / "search.csv").read_text()
    fit(Threshold(), samples, grid, tmp_path, resume=True)
    assert (tmp_path / "search.csv").read_text() == before
    with pytest.raises(ValueError, match=r"search\.csv"):
        fit(Threshold(0.03), samples, grid, tmp_path, resume=True)
    assert (tmp_path / "search.csv").read_text() == before
    fit(Threshold(0.03), samples, grid, Path(tmp_path))
    assert (tmp_path / "search.csv").read_text() != before
