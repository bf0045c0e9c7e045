"""Samples are what numpy cuts out; the same from stores, NIfTI and DICOM; the same again after an interruption."""

from __future__ import annotations

import itertools
import pickle

import nibabel
import numpy as np
import pytest
import torch
from monai.data import list_data_collate
from monai.transforms import Compose, RandFlipd, ScaleIntensityd

from permed_compute.errors import RefusedInput, WorkloadError
from permed_compute.learning.loader import Loader, Windowed
from permed_compute.learning.order import Order, Seeded
from permed_compute.paths import write_json
from permed_compute.workloads.radiology import nifti, volume_store
from permed_compute.workloads.radiology.patches import Balanced, Case, Grid, Random, Samples, Whole, cases
from permed_compute.workloads.radiology.read import Volume

from .made import load, write

SHAPES = [(70, 45, 40), (50, 64, 33), (40, 40, 60)]
AFFINE = np.array([[-0.8, 0, 0, 90], [0, 0.9, 0, -120], [0, 0, 2.5, -70], [0, 0, 0, 1.0]])


def made(number):
    """Image and label of case `number`."""
    random = np.random.default_rng(number)
    image = random.integers(-1000, 1000, SHAPES[number]).astype(np.int16)
    label = np.zeros(SHAPES[number], np.uint8)
    label[30:38, 30:36, 28:33] = 1
    if number != 1:
        label[5, 6, 7] = 2
    return image, label


def volume(array, digest):
    return Volume(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE, (), None, digest * 64, "CT")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Three cases as stores and, in `nifti`, as files."""
    folder = tmp_path_factory.mktemp("stores")
    for number in range(3):
        for kind, array in zip(("image", "label"), made(number), strict=True):
            volume_store.write(folder / f"{kind}{number}.zarr", volume(array, str(number)), inputs=[], kind=kind)
            nifti.write(array, AFFINE, folder / f"{kind}{number}.nii.gz", level=1)
    return folder


def items(folder, suffix=".zarr"):
    return [Case((folder / f"image{n}{suffix}",), folder / f"label{n}{suffix}") for n in range(3)]


def equal(one, other):
    return all(torch.equal(one[key].as_tensor(), other[key].as_tensor()) for key in ("image", "label"))


def test_a_random_patch_is_cut_from_its_volume_with_its_affine(stores):
    samples = Seeded(Samples(items(stores), Random((24, 20, 16), per_volume=4)), seed=3)
    assert len(samples) == 12
    starts = set()
    for index in range(12):
        sample = samples[(0, index)]
        image, label = made(index // 4)
        x, y, z = sample["image"].meta["location"]
        starts.add((x, y, z))
        assert np.array_equal(sample["image"][0].numpy(), image[x : x + 24, y : y + 20, z : z + 16])
        assert np.array_equal(sample["label"][0].numpy(), label[x : x + 24, y : y + 20, z : z + 16])
        np.testing.assert_allclose(sample["image"].affine.numpy() @ [0, 0, 0, 1], AFFINE @ [x, y, z, 1])
        assert sample["image"].dtype == torch.float32 and sample["label"].dtype == torch.uint8
    assert len(starts) == 12


def test_samples_depend_on_seed_epoch_and_index_only(stores):
    cut = Random((24, 20, 16), per_volume=2)
    one, other = Seeded(Samples(items(stores), cut), 3), Seeded(Samples(items(stores), cut), 3)
    forwards = [one[(1, index)] for index in range(6)]
    backwards = [other[(1, index)] for index in reversed(range(6))]
    assert all(equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    assert not equal(one[(0, 0)], one[(1, 0)]) and not equal(
        one[(0, 0)], Seeded(Samples(items(stores), cut), 4)[(0, 0)]
    )


@pytest.mark.parametrize(
    "cut",
    [Random((24, 20, 16), 3), Balanced((24, 20, 16), {0: 1, 1: 1, 2: 1}, 3), Grid((24, 20, 16), 0.25), Whole()],
    ids=["random", "balanced", "grid", "whole"],
)
def test_nifti_gives_the_same_samples(stores, cut):
    one = Seeded(Samples(items(stores), cut), 3)
    other = Seeded(Samples(items(stores, ".nii.gz"), cut), 3)
    assert len(one) == len(other)
    for index in range(len(one)):
        a, b = one[(0, index)], other[(0, index)]
        assert equal(a, b)
        np.testing.assert_allclose(a["image"].affine, b["image"].affine, atol=1e-4)


def test_dicom_gives_the_same_samples(tmp_path):
    write(tmp_path / "dicom", rows=40, columns=36)
    source = load(tmp_path / "dicom")
    volume_store.write(tmp_path / "a.zarr", source, inputs=[])
    cut = Random((20, 20, 6), 4)
    one = Seeded(Samples([Case((tmp_path / "a.zarr",))], cut), 3)
    other = Seeded(Samples([Case((tmp_path / "dicom",))], cut), 3)
    for index in range(4):
        a, b = one[(0, index)]["image"], other[(0, index)]["image"]
        assert torch.equal(a.as_tensor(), b.as_tensor()) and torch.equal(a.affine, b.affine)
        assert a.meta["filename_or_obj"] == b.meta["filename_or_obj"] == source.series


def test_balanced_patches_meet_their_class_and_every_voxel_of_it(stores):
    samples = Samples(items(stores)[:1], Balanced((8, 8, 8), {1: 1}, per_volume=400))
    label = made(0)[1]
    seen = set()
    for index in range(400):
        samples.set_random_state(seed=index)
        location = samples[index]["label"].meta["location"]
        middle = tuple(v + 4 for v in location)
        assert label[middle] == 1 or min(location) == 0 or max(np.add(location, 8) - label.shape) == 0
        seen.add(middle)
    assert len(seen) > 0.7 * (label == 1).sum()  # of 240 voxels in several chunks
    patch = Samples(items(stores)[:1], Balanced((8, 8, 8), {2: 5}))[0]["label"]
    assert (patch == 2).sum() == 1


def test_a_class_that_is_not_there_gives_way(stores):
    samples = Samples(items(stores)[1:2], Balanced((8, 8, 8), {1: 0.5, 2: 0.5}, per_volume=5))
    assert all((samples[index]["label"] == 1).any() for index in range(5))
    assert len(Samples(items(stores)[1:2], Balanced((8, 8, 8), {2: 1}))[0]["image"]) == 1
    with pytest.raises(WorkloadError, match="label"):
        Samples([Case(items(stores)[0].images)], Balanced((8, 8, 8), {1: 1}))[0]


def test_a_grid_covers_every_voxel(stores):
    samples = Samples(items(stores), Grid((24, 20, 16), 0.3))
    covered = [np.zeros(shape, int) for shape in SHAPES]
    which = np.repeat(range(3), np.diff(samples._first))
    for index in range(len(samples)):
        x, y, z = samples[index]["image"].meta["location"]
        covered[which[index]][x : x + 24, y : y + 20, z : z + 16] += 1
    assert all(seen.min() >= 1 for seen in covered)


def test_a_small_volume_lies_in_the_middle_of_darkness(stores):
    image = made(1)[0]  # (50, 64, 33)
    patch = Samples(items(stores)[1:2], Random((60, 60, 40)))[0]["image"][0].numpy()
    y = Samples(items(stores)[1:2], Random((60, 60, 40)))[0]["image"].meta["location"][1]
    assert np.array_equal(patch[5:55, :, 3:36], image[:, y : y + 60, :])
    outside = np.ones(patch.shape, bool)
    outside[5:55, :, 3:36] = False
    assert (patch[outside] == image.min()).all()


def test_several_images_are_channels_on_one_grid(stores):
    two = Case((stores / "image0.zarr", stores / "image0.nii.gz"), stores / "label0.zarr")
    sample = Samples([two], Whole())[0]["image"]
    assert sample.shape == (2, *SHAPES[0]) and torch.equal(sample[0].as_tensor(), sample[1].as_tensor())
    with pytest.raises(RefusedInput, match="GRIDS_DIFFER") as caught:
        Samples([Case((stores / "image0.zarr",), stores / "label1.zarr")], Random((8, 8, 8)))[0]
    assert caught.value.finding.numbers["shapes"] == [list(SHAPES[0]), list(SHAPES[1])]


def test_monais_transforms_take_them_and_are_repeatable(stores):
    transform = Compose([ScaleIntensityd("image"), RandFlipd(["image", "label"], prob=0.5, spatial_axis=0)])
    one, other = (Seeded(Samples(items(stores), Random((16, 16, 16), 4), transform=transform), 5) for _ in range(2))
    flips = set()
    for index in range(12):
        a, b = one[(2, index)], other[(2, index)]
        assert equal(a, b) and float(a["image"].min()) >= 0 and float(a["image"].max()) <= 1
        flips.add(float(a["image"].affine[0, 0]))
    assert flips == {-0.8, 0.8}
    batch = list_data_collate([one[(0, 0)], one[(0, 1)]])
    assert batch["image"].shape == (2, 1, 16, 16, 16)


# ------------------------------------------------------------------------------------------ memory


def test_decoded_volumes_stay_within_the_budget(stores):
    largest = max(int(np.prod(shape)) for shape in SHAPES) * 2
    samples = Samples(items(stores, ".nii.gz"), Random((8, 8, 8)), budget=int(largest * 2))
    for index in (0, 1, 2, 0, 1, 2):
        samples[index]
        assert samples._sources.held <= largest * 2
    with pytest.raises(WorkloadError, match="budget"):
        Samples(items(stores, ".nii.gz"), Random((8, 8, 8)), budget=largest // 2)[0]
    stored = Samples(items(stores), Random((8, 8, 8)), budget=1)
    assert stored[0]["image"].shape == (1, 8, 8, 8) and stored._sources.held == 0
    assert pickle.loads(pickle.dumps(samples))._sources.held == 0


# ------------------------------------------------------------------------------------------ order and position


def batches(loader):
    return [[int(value) for value in batch["index"]] for batch in loader]


class Numbers:
    """Stands for samples: each says its number and what was drawn for it."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"index": index, "drawn": float(np.random.random())}


def order(window=1, rank=0, world=1, batch=4):
    return Windowed(24, batch, 7, rank, world, groups=[index // 6 for index in range(24)], window=window)


def test_a_window_of_one_reads_group_by_group_and_a_wide_one_mixes():
    narrow = [index for batch in order(1).of(0) for _, index in batch]
    groups = [index // 6 for index in narrow]
    assert sorted(narrow) == list(range(24)) and sum(a != b for a, b in itertools.pairwise(groups)) == 3
    assert groups != sorted(groups) or [i for b in order(1).of(1) for _, i in b] != narrow
    wide = [index for batch in order(8).of(0) for _, index in batch]
    assert sorted(wide) == list(range(24)) and wide != narrow
    # A sample leaves at the earliest when it is within the window.
    ranks = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    lined = sorted(range(24), key=lambda index: ranks[index // 6])
    assert all(lined.index(index) < place + 8 for place, index in enumerate(wide))


def test_ranks_share_each_batch():
    whole = [[index for _, index in batch] for batch in order(5).of(2)]
    shares = [[[index for _, index in batch] for batch in order(5, rank, 2).of(2)] for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]
    with pytest.raises(WorkloadError):
        Windowed(24, 4, 7, groups=[0], window=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was_whatever_its_workers(workers):
    whole = Loader(Seeded(Numbers(), 7), order(6))
    straight = [batch for _ in range(2) for batch in whole]
    part = Loader(Seeded(Numbers(), 7), order(6), workers=workers)
    seen = []
    for batch in part:
        seen.append(batch)
        if len(seen) == 2:
            break
    state = pickle.loads(pickle.dumps(part.state_dict()))
    assert state == {"epoch": 0, "batch": 2}
    again = Loader(Seeded(Numbers(), 7), order(6), workers=workers)
    again.load_state_dict(state)
    seen += [*again, *again]
    assert len(seen) == len(straight) == 12
    for one, other in zip(seen, straight, strict=True):
        assert torch.equal(one["index"], other["index"]) and torch.equal(one["drawn"], other["drawn"])


def test_workers_give_the_samples_of_one_process(stores):
    cut = Random((16, 16, 16), 4)

    def run(workers):
        samples = Samples(items(stores), cut)
        windowed = Windowed(12, 3, 1, groups=samples.groups, window=4)
        return [
            batch["image"] for batch in Loader(Seeded(samples, 1), windowed, workers=workers, collate=list_data_collate)
        ]

    for one, other in zip(run(0), run(2), strict=True):
        assert torch.equal(one.as_tensor(), other.as_tensor())


def test_groups_are_volumes_or_shards(stores):
    assert Samples(items(stores), Random((8, 8, 8), 2)).groups == [0, 0, 1, 1, 2, 2]
    assert len(set(Samples(items(stores), Grid((16, 16, 16))).groups)) == 3
    assert isinstance(Windowed(4, 2, 0, groups=[0, 0, 1, 1], window=2), Order)


def test_a_decathlon_list_names_the_cases(stores):
    rows = [{"image": "image0.zarr", "label": "label0.zarr"}, {"image": ["image1.zarr", "image1.nii.gz"]}]
    write_json(stores / "dataset.json", {"training": rows, "test": ["image2.zarr"]})
    one, two = cases(stores / "dataset.json")
    assert one == items(stores)[0] and len(two.images) == 2 and two.label is None
    assert cases(stores / "dataset.json", "test") == [Case((stores / "image2.zarr",))]
    assert nibabel.load(two.images[1]).shape == SHAPES[1]
