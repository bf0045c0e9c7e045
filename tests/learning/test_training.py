"""The loop in one process: the same bits however often it is interrupted, and checkpoints that are no pickles."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from permed_compute.errors import WorkloadError  # noqa: E402
from permed_compute.learning import randomness, snapshot  # noqa: E402
from permed_compute.learning.order import Order  # noqa: E402
from permed_compute.learning.training import DeviceMemoryError, Pace, Recipe, Trained, digest, fit, fitting  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import StopAfter  # noqa: E402

SPEC = JobSpec(name="training", workload="a:b", seed=3)


class Noisy:
    """Samples that draw from every global stream."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        noise = torch.randn(4) + float(np.random.rand()) + random.random()
        return {"x": noise, "y": torch.tensor([float(index)])}


class Randomizable:
    """As MONAI's: a stream of its own in `R`."""

    def __init__(self) -> None:
        self.R = np.random.RandomState(5)


def train(root: Path, left: int = 0, batch: int = 4, **pace: Any) -> Trained | None:
    ctx = StopAfter(root, SPEC)
    ctx.left = left
    randomness.seed_all(9)
    source = Randomizable()
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch["x"]) * float(source.R.rand()), batch["y"])

    recipe = Recipe(
        model, Noisy(), loss, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3), sources=[source],
        evaluate=lambda model, epoch: {"drawn": float(torch.rand(1))},
    )  # fmt: skip
    return fit(recipe, Pace(**{"epochs": 4, "batch": batch, "checkpoint_s": 0, **pace}), ctx)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    done = train(tmp_path_factory.mktemp("whole"))
    assert done is not None and done.steps == 8
    return done


@pytest.mark.parametrize(("step", "loaders"), [*((step, 0) for step in range(1, 8)), (3, 2), (6, 2)])
def test_stopped_after_any_step_it_ends_with_the_same_bits(
    tmp_path: Path, whole: Trained, step: int, loaders: int
) -> None:
    assert train(tmp_path, step, loaders=loaders) is None
    torch.rand(step), np.random.rand(step), random.random()
    done = train(tmp_path, loaders=loaders)
    assert done is not None
    assert (done.resumed_at, digest(done.model), done.history) == (step, digest(whole.model), whole.history)


def test_stopped_at_every_step_and_saved_on_a_schedule(tmp_path: Path, whole: Trained) -> None:
    done = None
    for _ in range(20):
        done = train(tmp_path, 2, checkpoint_steps=1)
        if done is not None:
            break
    assert done is not None and digest(done.model) == digest(whole.model)
    assert len([path for path in tmp_path.glob("checkpoint-*")]) == 2


def test_a_batch_in_pieces_is_nearly_the_batch(tmp_path: Path) -> None:
    one = train(tmp_path / "one", epochs=1)
    two = train(tmp_path / "two", epochs=1, micro=2)
    assert one is not None and two is not None
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=0.5)  # batch norm sees other pieces


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 2)
    with pytest.raises(WorkloadError, match="batch differ"):
        train(tmp_path, batch=2)


def test_a_checkpoint_that_is_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "checkpoint-000001" / "rank-0"
    folder.mkdir(parents=True)
    torch.save({"model": Evil()}, folder / snapshot.SHARED)
    with pytest.raises(Exception, match="Weights only"):
        snapshot.read_shared(folder.parent)
    assert not (tmp_path / "ran").exists()


def test_every_rank_sees_its_share_of_the_same_batches() -> None:
    alone = list(Order(11, 4, seed=3).of(epoch=2))
    shares = [list(Order(11, 4, 3, rank, 2).of(2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]
    assert list(Order(11, 4, seed=3).of(epoch=2, first=1)) == alone[1:]
    assert list(Order(11, 4, seed=3).of(epoch=3)) != alone
    with pytest.raises(WorkloadError, match="evenly"):
        Order(11, 4, 3, 0, 3)
    with pytest.raises(WorkloadError, match="Make the batch smaller"):
        Order(3, 4, 3)


def test_what_does_not_fit_is_halved_until_it_does() -> None:
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError

    assert fitting(attempt, 12, lambda size: size) == 3
    assert tried == [12, 6, 3]

    def hopeless(size: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(DeviceMemoryError, match="single sample"):
        fitting(hopeless, 4, lambda size: size)
