"""Training a fusion network: an epoch of the shared loop, beside a plain PyTorch loop on tensors in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Case

TITLE = "A fusion network's epoch"
WHY = (
    "The shared loop can stop at every step, checkpoints and gives the same bits again; that must not cost a small"
    " network its speed. Network, loss, optimiser and batches are the same on both sides: five modalities of 32"
    " components, Cox loss. The peer shuffles tensors in memory and does nothing else. One thread, as a fold of a job"
    " has; CPU seconds, because machines are shared. Goal: 0.9 of its people per second."
)
_SIZES = (32,) * 5


def cases(quick: bool) -> list[Case]:
    people, epochs = (2_048, 2) if quick else (20_000, 2)
    group = "people a second, batches of 512"
    unit, goal = "people/CPU s", "≥ 0.9 of the plain loop"
    ours, plain = (partial(_on_one_thread, measure, people, epochs) for measure in (_ours, _plain))
    return [
        Case(group, "ours", unit, "higher", ours, goal=goal, ratio=0.9),
        Case(group, "plain PyTorch loop", unit, "higher", plain, peer=True),
    ]


def _on_one_thread(measure: Callable[[int, int], float], people: int, epochs: int) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(people, epochs)
    finally:
        torch.set_num_threads(before)


@cache
def _columns(people: int):  # type: ignore[no-untyped-def] - torch is imported where it is used
    import torch

    chance = np.random.default_rng(0)
    x = chance.normal(size=(people, sum(_SIZES))).astype(np.float32)
    mask = chance.random((people, len(_SIZES))) < 0.8
    mask[:, 0] = True
    event_at, censored_at = chance.exponential(np.exp(-x[:, 0])), chance.exponential(2, people)
    found = (x, mask, np.minimum(event_at, censored_at), event_at <= censored_at)
    return tuple(map(torch.from_numpy, found))


def _made():  # type: ignore[no-untyped-def] - torch is imported where it is used
    from permed_compute.workloads.fusion.learn import How
    from permed_compute.workloads.fusion.network import Fusion, Shape

    return Fusion(Shape(_SIZES, 64, 1, 0.3, 0.3), 1), How(epochs=1, batch=512)


def _ours(people: int, epochs: int) -> float:
    from dataclasses import replace

    from permed_compute.learning.training import fit
    from permed_compute.spec import JobSpec
    from permed_compute.testing.context import LocalContext
    from permed_compute.workloads.fusion.learn import pace_of, recipe_of
    from permed_compute.workloads.fusion.network import InMemory

    net, how = _made()
    how, samples = replace(how, epochs=epochs), InMemory(_columns(people), how.batch, 0)
    with tempfile.TemporaryDirectory(prefix="permed-bench-fusion-") as folder:
        ctx = LocalContext(Path(folder), JobSpec(name="b", workload="fusion/train-survival"))
        recipe, pace = recipe_of(net, samples, how), pace_of(how, samples)
        begun = time.process_time()
        done = fit(recipe, pace, ctx)
        taken = time.process_time() - begun
    assert done is not None and done.steps == epochs * (people // 512)
    return done.steps * 512 / taken


def _plain(people: int, epochs: int) -> float:
    import torch

    from permed_compute.workloads.fusion.learn import COX, loss_of

    net, how = _made()
    columns, loss = _columns(people), loss_of(COX)
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (people // 512))
    net.train()
    begun, steps = time.process_time(), 0
    for _ in range(epochs):
        order = torch.randperm(people)
        for first in range(0, people - 511, 512):
            rows = order[first : first + 512]
            optimizer.zero_grad(set_to_none=True)
            found = loss(net, tuple(column[rows] for column in columns))
            torch.autograd.backward(found)
            optimizer.step()
            scheduler.step()
            steps += 1
    return steps * 512 / (time.process_time() - begun)
