"""Rank, nearest neighbours and linear probe on constructed features."""

from __future__ import annotations

import pytest
import torch

from swinscale.diagnose.features import feature_rank, linear_probe, nearest_neighbours
from swinscale.errors import UsageError


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Columns of length 1 that are orthogonal to each other and to a constant column."""
    random = torch.cat([torch.ones(rows, 1), torch.randn(rows, columns)], 1).double()
    return torch.linalg.qr(random)[0][:, 1:]


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_rank_counts_directions_of_equal_strength(directions):
    features = orthonormal(40, directions) @ orthonormal(12, directions).T * 5 + 2
    rank = feature_rank(features)
    assert rank.effective == pytest.approx(directions, rel=1e-4)
    assert rank.largest_share == pytest.approx(1 / directions, rel=1e-4)


def test_rank_of_unequal_directions_is_the_formula():
    """Roy and Vetterli: exp of the entropy of (3, 1) / 4; the variance is shared as 9 : 1."""
    features = orthonormal(20, 2) * torch.tensor([3.0, 1.0])
    rank = feature_rank(features)
    assert rank.effective == pytest.approx((4 / 3) ** 0.75 * 4**0.25, rel=1e-4)
    assert rank.largest_share == pytest.approx(0.9, rel=1e-4)


def test_equal_features_have_no_rank_though_rounding_tells_them_apart():
    same = torch.randn(1, 64).expand(100, 64)
    assert feature_rank(same) == (0.0, 1.0)
    assert feature_rank(same + 1e-7 * torch.randn(100, 64)).effective == 0.0


def test_neighbours_vote_by_similarity():
    """One very similar image outvotes three others; length does not count; ties of one cosine are a majority."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([2, 0, 0, 0])
    assert nearest_neighbours(train, labels, torch.tensor([[9.0, 0.5]])).tolist() == [2]
    assert nearest_neighbours(train, labels, torch.tensor([[9.0, 0.5]]), temperature=100.0).tolist() == [0]
    assert nearest_neighbours(train, labels, torch.tensor([[0.1, 0.1]]), neighbours=1).tolist() == [0]
    assert nearest_neighbours(train, labels, torch.tensor([[0.1, 0.1]]), neighbours=99).tolist() == [0]


def test_neighbours_separate_clusters():
    centres = torch.randn(5, 16)
    labels = torch.arange(5).repeat_interleave(30)
    train, test = (centres[labels] + 0.3 * torch.randn(150, 16) for _ in range(2))
    assert torch.equal(nearest_neighbours(train, labels, test), labels)


def test_linear_probe_finds_what_is_linear_in_noise_of_any_scale():
    """A class that one small channel tells among large random ones; neighbours cannot see it."""
    labels = torch.arange(3).repeat(100)
    train, test = (torch.randn(300, 40) * 100 for _ in range(2))
    for features in (train, test):
        features[:, 7] = 0.01 * labels + 0.001 * torch.randn(300) + 5
        features[:, 8] = 0.01 * (labels == 1) + 0.001 * torch.randn(300)
    right = (linear_probe(train, labels, test) == labels).double().mean()
    assert right > 0.97
    assert (nearest_neighbours(train, labels, test) == labels).double().mean() < 0.6


def test_linear_probe_takes_a_penalty_that_left_out_images_call_for(monkeypatch):
    """As many noisy channels as images, where plain least squares is at its worst."""
    import swinscale.diagnose.features as module

    labels = torch.arange(2).repeat(30)

    def draw() -> torch.Tensor:
        return torch.randn(60, 60) + 0.6 * (2 * labels[:, None] - 1) * (torch.arange(60) < 15)

    train, test = draw(), torch.cat([draw() for _ in range(5)])
    truth = labels.repeat(5)
    chosen = (linear_probe(train, labels, test) == truth).double().mean()
    monkeypatch.setattr(module, "PENALTIES", (1e-4,))
    least_squares = (linear_probe(train, labels, test) == truth).double().mean()
    assert chosen > 0.9 and chosen > least_squares + 0.1


def test_linear_probe_solves_the_normal_equations(monkeypatch):
    import swinscale.diagnose.features as module

    monkeypatch.setattr(module, "PENALTIES", (0.1,))
    labels, train, test = torch.randint(0, 3, (30,)), torch.randn(30, 5), torch.randn(200, 5)
    x = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    y = torch.nn.functional.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + 0.1 * 30 * torch.eye(5), x.T @ (y - y.mean(0)))
    inputs = (test.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    assert torch.equal(linear_probe(train, labels, test), (inputs @ weights + y.mean(0)).argmax(1))


def test_probes_repeat_themselves_and_constant_channels_do_no_harm():
    labels, train, test = torch.randint(0, 4, (50,)), torch.randn(50, 8), torch.randn(20, 8)
    train[:, 3] = test[:, 3] = 1.0
    for predict in (nearest_neighbours, linear_probe):
        assert torch.equal(predict(train, labels, test), predict(train, labels, test))


def test_what_does_not_fit_is_said():
    with pytest.raises(UsageError, match="two images"):
        feature_rank(torch.randn(1, 8))
    for predict in (nearest_neighbours, linear_probe):
        with pytest.raises(UsageError, match=r"\(4, 8\).*\(4, 9\)"):
            predict(torch.randn(4, 8), torch.zeros(4, dtype=torch.long), torch.randn(4, 9))
        with pytest.raises(UsageError, match="0 or more"):
            predict(torch.randn(4, 8), torch.full((4,), -1), torch.randn(4, 8))
