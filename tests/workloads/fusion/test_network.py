"""The network: what is not there counts for nothing, and what is fitted is fitted on those it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from permed_compute.workloads.fusion.network import Fusion, InMemory, Projection, Shape

SHAPE = Shape((3, 2), 8, 1, dropout=0.5, absent=0.6)


def test_components_are_those_of_the_training_people_in_order_of_variance() -> None:
    chance = np.random.default_rng(0)
    values = (chance.normal(size=(40, 3)) * [5, 2, 1]) @ chance.normal(size=(3, 100)) + 7
    fitted = Projection.fit(values.astype(np.float32), 3)
    found = fitted.of(values.astype(np.float32))
    z = (values - values.mean(axis=0)) / values.std(axis=0)
    left, size, _ = np.linalg.svd(z, full_matrices=False)
    theirs = (left * size)[:, :3] / size[0] * np.sqrt(40)
    assert np.allclose(np.abs(found), np.abs(theirs), atol=1e-3)
    assert found.std(axis=0)[0] == pytest.approx(1, abs=1e-3) and (np.diff(found.std(axis=0)) < 0).all()


def test_tall_and_wide_tables_give_the_same_components() -> None:
    chance = np.random.default_rng(1)
    values = chance.normal(size=(12, 11)).astype(np.float32)
    wide, tall = Projection.fit(values[:10], 4), Projection.fit(np.repeat(values[:10], 3, axis=0), 4)
    assert np.allclose(wide.of(values), tall.of(values), atol=1e-4)


def test_a_column_that_is_constant_or_nowhere_known_is_left_out_and_missing_is_the_mean() -> None:
    values = np.array([[1, 5, np.nan], [3, 5, np.nan], [np.nan, 5, np.nan], [np.nan] * 3], np.float32)
    fitted = Projection.fit(values, 8)
    assert fitted.outputs == 1
    assert fitted.of(values)[:, 0] == pytest.approx([-1, 1, 0, 0])
    assert fitted.of(np.array([[3, 9, 9]], np.float32))[0, 0] == pytest.approx(1)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    return torch.randn(4, 5, generator=chance), mask


def test_what_a_modality_that_is_not_there_holds_makes_no_difference() -> None:
    net = Fusion(SHAPE, 1).eval()
    torch.nn.init.normal_(net.score.weight)
    x, mask = batch()
    other = x.clone()
    other[1, 3:], other[2, :3] = 99.0, -99.0
    (one, weights), (two, _) = net.weighed(x, mask), net.weighed(other, mask)
    assert torch.equal(one, two) and not torch.equal(net(x, mask), net(other, torch.ones_like(mask)))
    assert torch.allclose(weights.sum(dim=1), torch.ones(4)) and not weights[~mask].any()


def test_somebody_always_keeps_a_modality_and_nobody_gains_one() -> None:
    net = Fusion(SHAPE, 2)
    _, mask = batch()
    kept = torch.stack([net._taken_away(mask) for _ in range(200)])
    assert kept.any(dim=2).all() and not (kept & ~mask).any()
    assert 0.68 < kept[:, 0].float().mean() < 0.84  # 0.4 of each, and both of the 0.36 that would be left with none


def test_what_is_drawn_is_the_networks_own() -> None:
    x, mask = batch()
    one, other = Fusion(SHAPE, 3).train(), Fusion(SHAPE, 3).train()
    torch.manual_seed(0)
    first = [one(x, mask) for _ in range(3)]
    torch.manual_seed(1)
    second = [other(x, mask) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and not torch.equal(first[0], first[1])


def test_batches_are_those_of_the_order_and_can_be_taken_up_in_the_middle() -> None:
    from permed_compute.learning.order import Order

    samples = InMemory((torch.arange(10.0), torch.arange(10) * 2), 4, seed=5)
    wanted = [[index for _, index in keys] for keys in Order(10, 4, 5).of(1)]
    assert [own.tolist() for own, _ in samples.batches(1, 0)] == wanted
    assert [own.tolist() for own, _ in samples.batches(1, 1)] == wanted[1:]
    assert all(torch.equal(doubled, own.long() * 2) for own, doubled in samples.batches(0, 0))
