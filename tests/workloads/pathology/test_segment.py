"""Segmentation: the same over tile borders as in one piece, objects once, what QuPath and a PACS open, refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
import zarr

from permed_compute.errors import SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.testing.context import Outcome, run_map
from permed_compute.workloads.pathology import encoders, geojson, labels, merge, segment, segmenters, stain, tissue
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide

from .made import write


def spec(*paths, **params):
    purpose = params.pop("purpose", "research")
    return JobSpec(
        name="t", workload="pathology/segment", inputs=tuple(str(path) for path in paths), params=params,
        purpose=purpose,
    )  # fmt: skip


def merged(outcome: Outcome) -> Path:
    assert not outcome.failures, outcome.failures
    (item,) = [item for item in outcome.done if item.part.params["step"] == "merge"]
    return item.folder


def level0(folder: Path) -> np.ndarray:
    (name,) = [path.name for path in (folder / "labels").iterdir() if path.is_dir()]
    return np.asarray(zarr.open_group(folder / "labels" / name, mode="r")["0"][:])


def features(folder: Path) -> list[dict]:
    return json.loads((folder / merge.OBJECTS).read_text("utf-8"))["features"]


def polygons(folder: Path) -> list[shapely.Polygon]:
    return [shapely.geometry.shape(item["geometry"]) for item in features(folder)]


def same_bytes(one: Path, other: Path) -> bool:
    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return digests(one) == digests(other)


# ------------------------------------------------------------------------------------------------ networks


def graph(path: Path, *, takes: int = 3, gives: int = 3, edge: int | str = "h") -> dict:
    """A convolution over 9 × 9 and a norm over the whole window, as most networks have; and the model that it is."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    random = np.random.default_rng(5)
    kernel = random.normal(0, 1, (gives, takes, 9, 9)).astype(np.float32)
    weights = {"k": kernel, "one": np.ones(gives, np.float32), "zero": np.zeros(gives, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[4, 4, 4, 4]),
        helper.make_node("InstanceNormalization", ["c", "one", "zero"], ["y"]),
    ]
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", float32, ["n", takes, edge, edge])],
        [helper.make_tensor_value_info("y", float32, ["n", gives, "a", "b"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return {"onnx": str(path), "mpp": 0.5, "classes": ["Red", None, "Green"], "window": 192, "name": "net"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`slide.tiff`, 1100 × 900 at 0.5 µm, and `nuclei.tiff`, of which is known where its nuclei lie: to be read."""
    folder = tmp_path_factory.mktemp("segment")
    write(folder / "slide.tiff")
    write(folder / "nuclei.tiff", drawn()[0])
    return folder


@pytest.fixture(scope="module")
def network(place: Path) -> dict:
    return graph(place / "net.onnx")


@pytest.fixture(scope="module")
def ran(place: Path) -> Callable[..., Outcome]:
    """A job over one of the slides; asked twice for the same, it ran once."""
    known: dict[str, Outcome] = {}

    def run(name: str, **params) -> Outcome:
        key = json.dumps([name, params], sort_keys=True)
        if key not in known:
            known[key] = run_map(segment.WORKLOAD, spec(place / name, **params), place / f"run-{len(known)}")
        return known[key]

    return run


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """(900, 1000, 3) eosin with nuclei as discs, some of which touch; and their numbers, 0 elsewhere."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(2)
    image, numbers = np.full((900, 1000, 3), 245, np.float32), np.zeros((900, 1000), int)
    image[80:820, 80:920] = (225, 150, 190)
    y, x = np.mgrid[:900, :1000]
    count = 0
    for top in range(110, 800, 40):
        for left in range(110, 880, 40):
            cy, cx, radius = top + random.integers(-6, 7), left + random.integers(-6, 7), random.uniform(7, 10)
            for k in range(1 + (random.random() < 0.15)):  # every seventh has a neighbour that touches it
                count += 1
                numbers[(y - cy) ** 2 + (x - cx - 1.7 * radius * k) ** 2 < radius**2] = count
    image[numbers > 0] = (95, 60, 140)
    image = gaussian_filter(image, (1.2, 1.2, 0)) + random.normal(0, 2, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), numbers


def allowed(slide: Path, shape: tuple[int, int], mpp: float | None = None) -> np.ndarray:
    """Where the job may label: the tissue and two pixels of its view."""
    from scipy import ndimage

    with Reader(open_slide(slide, mpp=mpp)) as reader:
        found = tissue.detect(tissue.overview(reader))
    mask = ndimage.binary_dilation(found.tissue, iterations=2)
    y, x = ((np.arange(length) + 0.5) / found.view.scale[k] for length, k in zip(shape, (1, 0), strict=True))
    at_y, at_x = np.minimum(y.astype(int), mask.shape[0] - 1), np.minimum(x.astype(int), mask.shape[1] - 1)
    return mask[at_y[:, None], at_x[None]]


def test_tiles_give_what_monai_gives_of_the_whole_slide(place, ran, network):
    import onnxruntime
    import torch
    from monai.inferers import sliding_window_inference

    found = level0(merged(ran("slide.tiff", model=network, tile=512)))
    with Reader(open_slide(place / "slide.tiff")) as reader:
        pixels = reader.read(0.5, 0, 0, reader.dimensions).astype(np.float32).transpose(2, 0, 1) / 255
    session = onnxruntime.InferenceSession(network["onnx"], providers=["CPUExecutionProvider"])

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    logits = sliding_window_inference(
        torch.from_numpy(pixels)[None], (192, 192), 1, predict, overlap=0.25, mode="gaussian"
    )
    wanted = np.array([1, 0, 2], np.uint8)[logits[0].numpy().argmax(0)]
    wanted[~allowed(place / "slide.tiff", wanted.shape)] = 0
    assert found.shape == wanted.shape and len(np.unique(wanted)) == 3
    assert (found == wanted).mean() >= 0.999


def test_regions_are_counted_once_and_tile_the_map(ran, network, tmp_path):
    from skimage.measure import label

    outcome = ran("slide.tiff", model=network, tile=512)
    found, whole = polygons(merged(outcome)), level0(merged(outcome))
    assert len(found) == label(whole, connectivity=1, background=0).max() == outcome.result.values["objects"]
    assert all(polygon.is_valid for polygon in found)
    assert sum(polygon.area for polygon in found) == np.count_nonzero(whole)
    one_piece = merged(ran("slide.tiff", model=network, tile=2048))
    assert np.array_equal(whole, level0(one_piece))
    assert sorted(p.normalize().wkt for p in found) == sorted(p.normalize().wkt for p in polygons(one_piece))
    tiles = {
        (item.part.params["row"], item.part.params["column"]): item.folder / segment.LABELS
        for item in outcome.done
        if item.part.params["step"] == "tile"
    }
    classes = tuple(labels.Named(k, "x", (0, 0, 0)) for k in (1, 2))
    frame = merge.Frame(512, 0, whole.shape[::-1], (1.0, 1.0), 0.5, "x", classes, least_um2=25)
    told = merge.regions(frame, tiles, tmp_path, tmp_path)
    assert 0 < sum(polygon.area * 0.25 >= 25 for polygon in found) == told["objects"] < len(found)
    assert np.array_equal(level0(tmp_path), whole)


def test_another_resolution_lies_on_the_same_places(ran, network):
    folder = merged(ran("slide.tiff", model={**network, "mpp": 1.1}))
    shape = level0(folder).shape
    assert shape == (math.ceil(900 / 2.2), math.ceil(1100 / 2.2))
    (item, *_) = sorted(features(folder), key=lambda item: -item["properties"]["measurements"]["Area µm^2"])
    polygon = shapely.geometry.shape(item["geometry"])
    assert polygon.is_valid
    assert polygon.area * 0.25 == pytest.approx(item["properties"]["measurements"]["Area µm^2"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ instances


def test_nuclei_over_tiles_are_those_of_one_piece(ran):
    tiled, whole = (ran("nuclei.tiff", tile=tile) for tile in (512, 2048))
    ours, wanted = level0(merged(tiled)), level0(merged(whole))
    assert ((ours > 0) == (wanted > 0)).mean() >= 0.999
    count = whole.result.values["objects"]
    assert count > 300 and tiled.result.values["objects"] == count
    found = polygons(merged(tiled))
    assert len(found) == count == len(np.unique(ours)) - 1 and all(polygon.is_valid for polygon in found)
    assert sum(polygon.area for polygon in found) == np.count_nonzero(ours)
    one, other = shapely.STRtree(found).query(found, predicate="overlaps")
    assert not len(one), (one, other)


def test_nuclei_are_those_that_were_drawn(ran):
    truth = drawn()[1]
    outcome = ran("nuclei.tiff", tile=512)
    ours = level0(merged(outcome)) > 0
    assert 2 * (ours & (truth > 0)).sum() / (ours.sum() + (truth > 0).sum()) > 0.9
    assert outcome.result.values["objects"] == pytest.approx(len(np.unique(truth)) - 1, rel=0.02)


def test_a_users_function_and_objects_that_two_tiles_claim(place, tmp_path, monkeypatch):
    """Its answer depends on where a tile begins, so that neighbours disagree: still no pixel belongs to two."""
    (tmp_path / "blocks.py").write_text(
        "import numpy as np\n"
        "def segment(pixels, mpp):\n"
        "    y, x = np.mgrid[:pixels.shape[0], :pixels.shape[1]]\n"
        "    numbers = (y // 24) * 1000 + x // 24 + 1\n"
        "    return np.where((y % 24 > 2) & (x % 24 > 2) & (pixels.mean(2) < 225), numbers, 0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"callable": "blocks:segment", "gives": "instances", "mpp": 0.5, "halo": 41, "classes": ["Block"]}
    slide = place / "slide.tiff"
    outcome = run_map(segment.WORKLOAD, spec(slide, model=model, tile=512), tmp_path / "w")
    found = polygons(merged(outcome))
    assert len(found) == outcome.result.values["objects"] > 50
    assert all(polygon.is_valid for polygon in found)
    assert shapely.unary_union(found).area == sum(polygon.area for polygon in found)
    with pytest.raises(WorkloadError, match="no function"):
        segmenters.recipe({**model, "callable": "blocks:nothing"})
    assert segment.model_digest(spec(slide, model=model, purpose="care"), outcome.context) == ""


@pytest.mark.parametrize(
    ("answer", "said"),
    [("pixels[..., 0] / 2", "float64"), ("pixels[:-1, :, 0]", "gave uint8 of"), ("pixels[..., 0] * 0 + 9", "label 9")],
)
def test_a_function_that_answers_something_else(place, tmp_path, monkeypatch, answer, said):
    name = f"wrong{abs(hash(answer)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(f"def segment(pixels, mpp):\n    return {answer}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"callable": f"{name}:segment", "mpp": 0.5, "halo": 8, "classes": ["One"]}
    outcome = run_map(segment.WORKLOAD, spec(place / "slide.tiff", model=model), tmp_path / "w")
    assert outcome.failures and all(said in str(error) for error in outcome.failures.values())
    assert [finding.code for finding in outcome.context.findings] == ["SLIDE_INCOMPLETE"]
    assert outcome.result.values["slides"] == 0


def test_an_object_in_pieces_and_one_beyond_the_halo():
    found = np.zeros((40, 40), int)
    found[10:14, 10:14] = found[20, 20] = 3  # the larger piece is the object
    found[0:30, 25] = 7  # cut by the halo's edge
    found[2:5, 2:5] = 9  # the neighbour's
    kept, cut = merge.owned(found, 8)
    assert sorted(np.bincount(kept.reshape(-1))[1:]) == [16, 30] and cut == 1


# ------------------------------------------------------------------------------------------------ files


def test_the_same_bytes_again(place, ran, network, tmp_path):
    for name, params in (("slide.tiff", {"model": network, "tile": 512}), ("nuclei.tiff", {"tile": 512})):
        again = run_map(segment.WORKLOAD, spec(place / name, **params), tmp_path / name)
        assert same_bytes(merged(ran(name, **params)), merged(again))


def test_qupath_reads_objects_with_class_and_measurements(ran):
    folder = merged(ran("nuclei.tiff", tile=512))
    text = json.loads((folder / merge.OBJECTS).read_text("utf-8"))
    assert text["type"] == "FeatureCollection" and list(geojson.read(folder / merge.OBJECTS)) == text["features"]
    for item in text["features"]:
        told = item["properties"]
        assert item["type"] == "Feature" and item["geometry"]["type"] == "Polygon"
        assert item["geometry"]["coordinates"][0][0] == item["geometry"]["coordinates"][0][-1]
        assert told["objectType"] == "detection"
        assert told["classification"] == {"name": "Nucleus", "color": [60, 70, 170]}
        area, around = told["measurements"]["Area µm^2"], told["measurements"]["Perimeter µm"]
        polygon = shapely.geometry.shape(item["geometry"])
        assert area == pytest.approx(polygon.area * 0.25) and 0.7 < around / (polygon.length * 0.5) <= 1


def test_labels_are_ome_zarr(ran, network):
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    folder = merged(ran("slide.tiff", model=network, tile=512))
    group = zarr.open_group(folder / "labels" / "net", mode="r")
    told = models.ImageLabel.from_zarr(group).ome_attributes
    assert [item.label_value for item in told.image_label.colors] == [1, 2]
    assert [data.path for data in told.multiscales[0].datasets] == ["0", "1", "2"]
    assert group["0"].shards == (512, 512) and group["0"].chunks == (512, 512)
    assert np.array_equal(group["1"][:], group["0"][::2, ::2])
    assert np.array_equal(group["2"][:], group["0"][::4, ::4])
    assert models.Labels.from_zarr(zarr.open_group(folder / "labels", mode="r")).ome_attributes.labels == ["net"]


@pytest.fixture(scope="module")
def dark(shared_data: Path, tmp_path_factory) -> Callable[..., Outcome]:
    """A job over the DICOM slide, which labels what is dark."""
    folder = tmp_path_factory.mktemp("dark")
    (folder / "dark.py").write_text("def segment(pixels, mpp):\n    return (pixels.mean(2) < 150).astype(int)\n")
    model = {"callable": "dark:segment", "mpp": 2.0, "halo": 0, "classes": ["Dark"], "name": "dark"}
    source = shared_data / "pathology" / "CMU-1-Small-Region-dicom"
    known: dict[str, Outcome] = {}

    def run(name: str, **params) -> Outcome:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            if name not in known:
                given = spec(source, model=model, tile=512, **params)
                known[name] = run_map(segment.WORKLOAD, given, folder / name)
        return known[name]

    return run


def test_a_dicom_slide_gets_a_seg_in_its_frame_of_reference(shared_data, dark):
    from highdicom.seg import segread
    from pydicom import dcmread

    outcome = dark("once")
    folder = merged(outcome)
    seg, found = segread(folder / segment.SEG), level0(folder)
    files = (shared_data / "pathology" / "CMU-1-Small-Region-dicom").iterdir()
    (slide,) = [ds for ds in map(dcmread, files) if "VOLUME" in ds.ImageType]
    assert seg.FrameOfReferenceUID == slide.FrameOfReferenceUID and seg.StudyInstanceUID == slide.StudyInstanceUID
    assert seg.ContentQualification == "RESEARCH" and seg.segmented_property_types[0].meaning == "Dark"
    assert (seg.TotalPixelMatrixRows, seg.TotalPixelMatrixColumns) == found.shape
    whole = seg.get_total_pixel_matrix(combine_segments=True)
    assert found.any() and np.array_equal(whole[: found.shape[0], : found.shape[1]], found)
    # The far corner of its matrix is as far off as the slide's, to a pixel of it.
    spacing = float(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing[0])
    assert spacing * found.shape[1] == pytest.approx(0.000499 * slide.TotalPixelMatrixColumns, abs=spacing)
    findings = [finding.code for item in outcome.done for finding in item.findings]
    assert findings == ["NO_ORIGIN"]  # this slide has none
    assert same_bytes(folder, merged(dark("again")))
    assert not (merged(dark("without", seg=False)) / segment.SEG).exists()


@pytest.mark.dicom3tools
def test_the_slides_seg_is_valid_dicom(dark):
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian dicom3tools) is not on this machine; `make real-parts` brings it")
    told = subprocess.run(
        ["dciodvfy", str(merged(dark("once")) / segment.SEG)], capture_output=True, text=True, errors="replace"
    )
    assert [line for line in (told.stdout + told.stderr).splitlines() if line.startswith(("Error", "Abort"))] == []


# ------------------------------------------------------------------------------------------------ the real network

SHELL = pytest.mark.skipif(
    importlib.util.find_spec("shell") is None or not (Path(importlib.util.find_spec("shell").origin or "x").parent
    / "weights" / "model_v1.onnx").is_file(),
    reason="lavlab-shell is not installed (pip install --no-deps lavlab-shell==0.9.1)",
)  # fmt: skip


@SHELL
def test_shell_over_tiles_is_what_monai_makes_of_one_piece(shared_data, tmp_path):
    import torch
    from monai.inferers import sliding_window_inference
    from PIL import Image

    with Reader(open_slide(shared_data / "pathology" / "CMU-1-Small-Region.svs")) as reader:
        image = reader.read(1.0, 300, 500, (600, 400))
    Image.fromarray(image).save(tmp_path / "part.png")
    model = {"shipped": "lavlab-shell", "window": 256, "overlap": 0.25}
    outcome = run_map(segment.WORKLOAD, spec(tmp_path / "part.png", model=model, mpp=1.0, tile=512), tmp_path / "w")
    found = level0(merged(outcome))
    made = segmenters.load(segmenters.recipe(model), "cpu", 2, tmp_path)
    facts = next(item.part.params["facts"] for item in outcome.done if item.part.params["step"] == "tile")
    seen = stain.as_eho(image, facts).astype(np.float32).transpose(2, 0, 1) / 255

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(made._logits(x.numpy())[None])

    x = torch.from_numpy(seen)[None]
    logits = sliding_window_inference(x, (256, 256), 1, predict, overlap=0.25, mode="gaussian")[0].numpy()
    above = 1 / (1 + np.exp(-logits))  # as shell.inference has it
    inner, outer = ((above[k] > 0.5) & (above[k] > above[2]) for k in (0, 1))
    wanted = np.where(inner, 1, np.where(outer, 2, 0)).astype(np.uint8)
    wanted[~allowed(tmp_path / "part.png", wanted.shape, 1.0)] = 0
    assert (wanted == 2).mean() > 0.01 and (found == wanted).mean() >= 0.999


@SHELL
def test_eosin_haematoxylin_and_density_are_shells_own(shared_data):
    shells = pytest.importorskip("shell.transforms", reason="shell.transforms cannot be imported")
    with Reader(open_slide(shared_data / "pathology" / "CMU-1-Small-Region.svs")) as reader:
        view = tissue.overview(reader, 4.0)
    found = tissue.detect(view).tissue
    wanted = shells.estimate_stain_params(view.pixels, bg_mask=~found)
    facts = stain.eho(view.pixels, found)
    assert facts["light"] == pytest.approx(wanted["Io"])
    theirs = shells.apply_eho_chunked(view.pixels, **wanted).astype(int)
    assert np.abs(stain.as_eho(view.pixels, facts).astype(int) - theirs).max() <= 1


@SHELL
def test_weights_out_of_a_wheel_are_those_that_are_installed(tmp_path):
    _, about = encoders.shipped("segmenter", "lavlab-shell")
    folder = encoders.installed(about)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in about["files"]:
            wheel.write(folder / name, f"shell/{name}")
    given = {"shipped": "lavlab-shell", "wheel": str(tmp_path / "x.whl")}
    assert segmenters.recipe(given).digest == segmenters.recipe("lavlab-shell").digest
    segmenters.load(segmenters.recipe(given), "cpu", 1, tmp_path)
    with zipfile.ZipFile(tmp_path / "y.whl", "w") as wheel:
        for name in about["files"]:
            wheel.writestr(f"shell/{name}", b"other")
    with pytest.raises(WorkloadError, match="another release"):
        segmenters.recipe({**given, "wheel": str(tmp_path / "y.whl")})


# ------------------------------------------------------------------------------------------------ refusals


def test_models_that_cannot_be(tmp_path, network):
    for model, said in (
        ("shell", "no segmenter"), ({"hub": "x"}, "understood"), ({**network, "sha256": "00" * 32}, "digest"),
        ({**network, "onnx": str(tmp_path / "none.onnx")}, "not there"), ({**network, "overlap": 0.99}, "understood"),
        ({**network, "classes": []}, "understood"), ({k: v for k, v in network.items() if k != "mpp"}, "understood"),
        ({"callable": "no_such_module_here:f", "mpp": 1, "halo": 1, "classes": ["a"]}, "cannot be imported"),
        ({"shipped": "lavlab-shell", "wheel": str(tmp_path / "none.whl")}, "wheel is not there"),
    ):  # fmt: skip
        with pytest.raises(WorkloadError, match=said) as caught:
            segmenters.recipe(model)
        assert caught.value.remedy
    with pytest.raises(SpecError, match="tile"):
        segment.params_of({"tile": 1000})


@pytest.mark.parametrize(
    ("wrong", "more", "said"),
    [
        ({"takes": 4}, {}, "takes 4 channels"),
        ({"gives": 5}, {}, "gives 5 channels; the job names 3"),
        ({"edge": 128}, {}, "windows of 128"),
    ],
)
def test_graphs_that_do_not_fit(tmp_path, wrong, more, said):
    model = graph(tmp_path / "net.onnx", **wrong) | more
    with pytest.raises(WorkloadError, match=said) as caught:
        segmenters.load(segmenters.recipe(model), "cpu", 1, tmp_path)
    assert caught.value.remedy
    (tmp_path / "net.onnx").write_bytes(b"no graph at all")
    with pytest.raises(WorkloadError, match="cannot open the graph"):
        segmenters.load(segmenters.recipe(model), "cpu", 1, tmp_path)


def test_a_bad_slide_costs_no_other(tmp_path):
    write(tmp_path / "nompp.tiff", mpp=None)
    write(tmp_path / "glass.tiff", np.full((400, 400, 3), 245, np.uint8))
    (tmp_path / "zero.svs").write_bytes(b"")
    write(tmp_path / "slide.tiff", seed=3)
    names = ("nompp.tiff", "glass.tiff", "zero.svs", "slide.tiff")
    outcome = run_map(segment.WORKLOAD, spec(*(tmp_path / name for name in names)), tmp_path / "w")
    codes = sorted(error.finding.code for error in outcome.failures.values())
    assert codes == ["EMPTY_FILE", "NO_MPP", "NO_TISSUE"] and outcome.result.values["slides"] == 1
    assert str(tmp_path) not in repr([(item.part.name, item.part.inputs, item.part.params) for item in outcome.done])


def test_thinned_labels_for_pictures_keep_their_place(tmp_path):
    made = labels.LabelWriter(tmp_path, "x", 2000, 1500, 512, "uint8", 0.5)
    tile = np.zeros((512, 512), np.uint8)
    tile[100:300, 100:300] = 1
    made.put(1, 2, tile)
    made.close([labels.Named(1, "One", (1, 2, 3))], {})
    small, step = labels.thinned(tmp_path, "x", 200)
    y, x = np.nonzero(small)
    assert max(small.shape) <= 200 and small.shape == (math.ceil(1500 / step), math.ceil(2000 / step))
    assert abs(y.min() * step - 612) < step and abs(x.min() * step - 1124) < step
    assert list(labels.places(tmp_path, "x")) == [(512, 1024)]
    assert np.array_equal(labels.chunk(tmp_path, "x", (512, 1024)), tile)


def test_importing_the_workload_loads_nothing_heavy():
    heavy = ["torch", "zarr", "onnxruntime", "skimage", "scipy", "shapely", "highdicom", "pydicom", "PIL"]
    code = f"import sys, permed_compute.workloads.pathology.segment; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
