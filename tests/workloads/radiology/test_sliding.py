"""Streamed inference gives MONAI's labels, whatever is kept of the logits; and what is kept does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from permed_compute.errors import WorkloadError
from permed_compute.workloads.radiology import sliding
from permed_compute.workloads.radiology.sliding import Decision, Grid, Windows, labels


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


KINDS = pytest.mark.parametrize("kind", ["slab", "rows", "spilled"])


def keep(kind, classes, x, windows):
    """So many bytes that sums are kept of a layer of windows, of a row of windows, or not at all."""
    roi = [r if r > 0 else n for r, n in zip(windows.roi_size, x.shape[1:], strict=True)]
    row = 4 * classes * (roi[0] + 1) * (roi[1] + 1) * max(roi[2], x.shape[3])
    return {"slab": 1 << 40, "rows": row, "spilled": 0}[kind]


class Network(torch.nn.Module):
    """Small, untrained, and not the same everywhere in its window, so that blending matters."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Sequential(
            torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, classes, 3, padding=1)
        )

    def forward(self, x):
        place = torch.linspace(-1, 1, x.shape[-1])
        return self.body(x * (1 + place))


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def monais_logits(x, network, windows):
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        return sliding_window_inference(
            x[None], windows.roi_size, windows.batch, network, windows.overlap, windows.mode,
            sigma_scale=windows.sigma_scale, padding_mode=windows.padding_mode, cval=windows.cval,
        )[0]  # fmt: skip


CASES = {
    "constant": ((40, 37, 33), Windows((16, 16, 16))),
    "gaussian": ((40, 37, 33), Windows((16, 16, 16), (0.5, 0.5, 0.5), "gaussian")),
    "other overlaps, batches of 3": ((41, 30, 29), Windows((16, 8, 24), (0.5, 0.25, 0.7), "gaussian", 0.2, batch=3)),
    "smaller than the window": ((9, 40, 11), Windows((16, 16, 16), (0.5, 0.5, 0.5), "gaussian", cval=-1.0)),
    "reflected": ((12, 40, 30), Windows((16, 16, 16), padding_mode="reflect")),
    "one window": ((16, 16, 16), Windows((16, 16, 16), (0.5, 0.5, 0.5))),
    "the whole depth": ((20, 30, 30), Windows((-1, 16, 16))),
    "no overlap": ((33, 32, 16), Windows((16, 16, 16), (0.0, 0.0, 0.0))),
}


@KINDS
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("case", CASES)
def test_labels_are_monais(case, classes, kind):
    shape, windows = CASES[case]
    x, network = image(*shape), Network(classes)
    expected = monais_logits(x, network, windows).argmax(0).numpy()
    found = labels(x, network, windows, keep_bytes=keep(kind, classes, x, windows))
    assert np.array_equal(found, expected)
    assert len(np.unique(expected)) == classes


def test_the_importance_map_is_monais_to_the_bit():
    from monai.data.utils import compute_importance_map

    for roi, sigma in (((16, 16, 16), 0.125), ((96, 96, 96), 0.125), ((8, 20, 33), 0.3)):
        assert torch.equal(sliding.importance(roi, sigma, "cpu"), compute_importance_map(roi, "gaussian", sigma))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("way", ["compiled", "torch"])
@KINDS
def test_compiled_or_by_torch_as_on_a_gpu_and_by_any_number_of_threads(monkeypatch, kind, way, threads):
    x, network, windows = image(20, 37, 33), Network(3), Windows((16, 16, 16), (0.5, 0.5, 0.5), "gaussian")
    logits, most = monais_logits(x, network, windows), keep(kind, 3, x, windows)
    torch.set_num_threads(threads)
    if way == "torch":
        monkeypatch.setattr(sliding, "_kernels", lambda device: None)
    assert np.array_equal(labels(x, network, windows, keep_bytes=most), logits.argmax(0).numpy())
    shape = (33, 70, 40)
    expected = functional.interpolate(logits.double()[None], size=shape, mode="trilinear")[0].argmax(0).numpy()
    found = labels(x, network, windows, grid=Grid.same_extent(shape, x.shape[1:]), keep_bytes=most)
    assert np.array_equal(found, expected)


@KINDS
def test_a_class_that_is_ruled_out_by_minus_infinity_is_never_the_answer(kind):
    x, windows = image(20, 20, 20), Windows((16, 16, 16))
    network = lambda v: torch.cat((v * 0 - torch.inf, v, -v), 1)  # noqa: E731
    grid, most = Grid.same_extent((30, 20, 20), (20, 20, 20)), keep(kind, 3, x, windows)
    found = labels(x, network, windows, grid=grid, keep_bytes=most)
    assert set(np.unique(found)) == {1, 2}
    assert np.array_equal(labels(x, network, windows, keep_bytes=most), 1 + (x[0] < 0).numpy())


@KINDS
@pytest.mark.parametrize("shape", [(80, 66, 71), (25, 30, 19), (97, 33, 20)])
def test_on_another_grid_labels_are_those_of_resampled_logits(shape, kind):
    x, network, windows = image(48, 40, 36), Network(4), Windows((16, 16, 16), (0.5, 0.5, 0.5), "gaussian")
    logits = monais_logits(x, network, windows).double()
    expected = functional.interpolate(logits[None], size=shape, mode="trilinear")[0].argmax(0).numpy()
    most = keep(kind, 4, x, windows)
    found = labels(x, network, windows, grid=Grid.same_extent(shape, x.shape[1:]), keep_bytes=most)
    assert (found != expected).sum() <= 1e-6 * found.size


def test_of_a_million_voxels_at_most_one_differs_from_exactly_resampled_logits():
    """In float64, that is: `interpolate` in float32 rounds its places and differs itself in 2 to 4 of a million."""
    x, network, windows = image(64, 64, 48), Network(4), Windows((32, 32, 32), (0.25, 0.25, 0.25), "gaussian")
    shape = (128, 110, 72)
    logits = monais_logits(x, network, windows).double()
    expected = functional.interpolate(logits[None], size=shape, mode="trilinear")[0].argmax(0).numpy()
    found = labels(x, network, windows, grid=Grid.same_extent(shape, x.shape[1:]))
    assert (found != expected).sum() <= 1e-6 * found.size


@KINDS
def test_softmax_before_resampling_as_bundles_have_it(kind):
    x, network, windows = image(30, 30, 30), Network(4), Windows((16, 16, 16))
    shape = (50, 44, 61)
    probabilities = monais_logits(x, network, windows).double().softmax(0)
    expected = functional.interpolate(probabilities[None], size=shape, mode="trilinear")[0].argmax(0).numpy()
    grid = Grid.same_extent(shape, x.shape[1:])
    found = labels(
        x, network, windows, grid=grid, decision=Decision(activation="softmax"), keep_bytes=keep(kind, 4, x, windows)
    )
    assert (found != expected).sum() <= 1e-6 * found.size
    assert (labels(x, network, windows, grid=grid) != expected).mean() > 1e-3, "it is not the same as logits"


def test_one_channel_is_decided_by_a_threshold():
    x, network, windows = image(30, 30, 30), Network(1), Windows((16, 16, 16))
    expected = monais_logits(x, network, windows)[0].sigmoid().numpy() >= 0.55
    decision = Decision("threshold", "sigmoid", 0.55)
    assert np.array_equal(labels(x, network, windows, decision=decision), expected.astype(np.uint8))
    with pytest.raises(WorkloadError, match="one channel"):
        labels(x, Network(2), windows, decision=decision)


def test_outside_the_networks_grid_there_is_nothing():
    x, windows = image(16, 16, 16), Windows((16, 16, 16))
    always = lambda v: torch.stack((v[:, 0] * 0, v[:, 0] * 0 + 1), 1)  # noqa: E731
    grid = Grid((10, 20, 24), (1.0, 1.0, 1.0), (0.25, -2.0, -4.4))
    found = labels(x, always, windows, grid=grid)
    assert found[:, 2:18, 4:20].all() and found.sum() == 10 * 16 * 16


def test_nearest_labels_are_those_of_the_nearest_voxel():
    found = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    grid = Grid((7, 3, 3), (0.5, 1.0, 1.0), (-0.3, 0.0, 0.0))
    assert sliding.nearest(found, grid)[:, 0, 0].tolist() == [0, 0, 9, 9, 18, 18, 0]


def test_augmentation_and_ensembles_are_means_of_logits():
    x, windows = image(30, 20, 24), Windows((16, 16, 16), (0.5, 0.5, 0.5), "gaussian")
    one, two = Network(3), Network(3, seed=5)
    flips = [(), (0,), (1, 2)]
    turned = sliding.flipped(sliding.ensemble([one, two]), flips)

    def theirs(v):
        many = [net(v.flip([a + 2 for a in f])).flip([a + 2 for a in f]) for f in flips for net in (one, two)]
        return torch.stack(many).mean(0)

    expected = monais_logits(x, theirs, windows)
    top = expected.topk(2, 0).values
    clear = ((top[0] - top[1]) > 1e-5).numpy()
    found = labels(x, turned, windows)
    assert np.array_equal(found[clear], expected.argmax(0).numpy()[clear]) and clear.mean() > 0.999
    assert (found != labels(x, one, windows)).mean() > 0.01


def test_of_equal_logits_the_first_class_wins():
    same = lambda v: v.expand(-1, 4, -1, -1, -1)  # noqa: E731
    assert not labels(image(20, 20, 20), same, Windows((16, 16, 16))).any()


def test_more_than_255_classes():
    high = lambda v: torch.nn.functional.one_hot(torch.full(v.shape, 299)[:, 0], 300).movedim(-1, 1).float()  # noqa: E731
    found = labels(image(8, 8, 8), high, Windows((8, 8, 8)))
    assert found.dtype == np.int16 and (found == 299).all()


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (lambda x: x.new_full((x.shape[0], 2, *x.shape[2:]), float("nan")), "NaN"),
        (lambda x: torch.cat((x, x * float("nan")), 1), "NaN"),
        (lambda x: torch.cat((x, x * 0 + float("inf")), 1), "infinity"),
        (lambda x: x[:, :, ::2], "returned"),
        (lambda x: [x, x], "returned list"),
    ],
)
def test_what_is_no_map_of_logits_is_named(network, says):
    with pytest.raises(WorkloadError, match=says):
        labels(image(20, 20, 20), network, Windows((16, 16, 16)))


# ------------------------------------------------------------------------------------------------ memory


def hungry(most: int, calls: list):
    network = Network(3)

    def predict(x):
        calls.append(tuple(x.shape))
        if x[:, 0].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(x)

    return predict


def test_too_little_memory_gives_fewer_then_smaller_windows_and_says_which():
    x, windows, calls = image(40, 40, 40), Windows((32, 32, 32), batch=4), []
    found, used = sliding.fitting(windows, lambda w: labels(x, hungry(16 * 16 * 32, calls), w))
    assert used == replace(windows, batch=1, roi_size=(16, 16, 32))
    assert calls[:3] == [(4, 1, 32, 32, 32), (1, 1, 32, 32, 32), (1, 1, 16, 32, 32)]
    assert np.array_equal(found, monais_logits(x, Network(3), used).argmax(0).numpy())


def test_far_too_little_memory_is_a_named_failure():
    with pytest.raises(sliding.OutOfMemoryError, match=r"\(32, 32, 32\), nor of \(16, 16, 16\)") as caught:
        sliding.fitting(Windows((32, 32, 32)), lambda w: labels(image(40, 40, 40), hungry(10, []), w))
    assert caught.value.code == "out-of-memory" and "resources" in caught.value.remedy


def test_other_failures_are_not_taken_for_a_lack_of_memory():
    def broken(x):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        sliding.fitting(Windows((16, 16, 16)), lambda w: labels(image(16, 16, 16), broken, w))


PEAK = """
import json, sys, resource, torch
from pathlib import Path
from permed_compute.workloads.radiology.sliding import Grid, Windows, labels
classes, keep = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)

def status(name):
    return next(int(l.split()[1]) for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(name))

def network(x):
    c = torch.arange(classes).view(1, -1, 1, 1, 1)
    return torch.sin(x * (c + 1))

def run(n):
    x = torch.rand((1, n, n, n), generator=torch.Generator().manual_seed(0))
    grid = Grid.same_extent((n + n // 2,) * 3, (n,) * 3)
    return labels(x, network, Windows((16, 16, 16)), grid=grid, keep_bytes=keep)

run(20)
Path('/proc/self/clear_refs').write_text('5')
before = status('VmRSS')
found = run(80)
print(json.dumps({'extra_kib': status('VmHWM') - before, 'labels': int(found.max())}))
"""


def peak(classes: int, keep: int) -> int:
    """KiB of resident memory that a run in a process of its own adds at most."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(classes), str(keep)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["labels"] == classes - 1
    return int(found["extra_kib"])


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_the_number_of_classes(record_property):
    """Whole logits of 120³ are 7 MiB a class: 0.7 GiB of 105 classes. One window's output is 16 KiB a class."""
    budget = 8 << 20
    two, many, most = (peak(classes, budget) for classes in (2, 25, 105))
    record_property("extra_kib", {2: two, 25: many, 105: most})
    whole = 105 * 120**3 * 4 // 1024
    output = 105 * 16**3 * 4 // 1024
    assert max(many, most) <= two + budget // 1024 + 6 * output
    assert most < whole / 20
