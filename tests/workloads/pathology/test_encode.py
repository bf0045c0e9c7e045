"""Features: blocks, what they assemble to, what a kill leaves, who is quarantined, encoders by name and file."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import zarr

from permed_compute.errors import NotFoundError, RefusedInput, SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.testing.context import run_map
from permed_compute.workloads.pathology import encode, encoders, features, networks, segment, tiles
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide

from .made import write


@pytest.fixture(scope="module")
def mean_encoder(tmp_path_factory):
    """A TorchScript module whose features can be checked by hand: the mean of each colour."""
    import torch

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3))

    path = tmp_path_factory.mktemp("encoder") / "mean.pt"
    torch.jit.script(Mean()).save(str(path))
    return {"torchscript": str(path), "mean": [0, 0, 0], "std": [1, 1, 1], "name": "mean", "batch": 7}


def spec(*paths, **params):
    return JobSpec(
        name="t", workload="pathology/encode", inputs=tuple(str(path) for path in paths),
        params={"size": 64, "block": 10, **params},
    )  # fmt: skip


def test_features_are_those_of_the_tiles_in_order(slide, store, tmp_path, mean_encoder):
    outcome = run_map(encode.WORKLOAD, spec(slide, encoder=mean_encoder), tmp_path / "w")
    blocks = [item for item in outcome.done if item.part.params["step"] == "encode"]
    assert len(blocks) > 3 and not outcome.failures
    (name,) = outcome.result.values["features"].values()
    coords, found, facts = features.read(outcome.context.out / name)
    assert found.dtype == np.float16 and found.shape == (len(coords), 3) and facts["encoder"] == "mean"
    with Reader(open_slide(slide)) as reader:
        wanted = reader.read_many(0.5, coords, 64).mean((1, 2)) / 255
    assert np.allclose(found, wanted, atol=2e-3)
    group = zarr.open_group(outcome.context.out / name, mode="r")["grids/mpp0.5_px64"]
    assert np.array_equal(group["features/mean"][:], found) and np.array_equal(group["coords"][:], coords)


def test_exports_for_other_tools(slide, tmp_path):
    import anndata
    import h5py

    outcome = run_map(encode.WORKLOAD, spec(slide, encoder="noop", exports=["h5", "anndata"]), tmp_path / "w")
    out = outcome.context.out
    coords, found, _ = features.read(out / next(iter(outcome.result.values["features"].values())))
    with h5py.File(next((out / "h5").iterdir())) as file:
        assert file["features"].shape == found.shape and np.array_equal(file["coords"][:], coords)
        assert file["coords"].attrs["patch_size_level0"] == 64
    made = anndata.read_h5ad(next((out / "anndata").iterdir()))
    assert made.shape == found.shape and np.array_equal(made.obsm["spatial"], coords + 32)


def test_a_bad_tile_costs_its_slide_and_no_other(tmp_path):
    write(tmp_path / "good.tiff", seed=1)
    write(tmp_path / "bad.tiff", seed=2)
    from permed_compute.workloads.pathology.tiff import TiffSlide

    with TiffSlide(tmp_path / "bad.tiff") as slide:
        stored = slide.raw(0, 1, 2)
        at = (tmp_path / "bad.tiff").read_bytes().find(bytes(stored))
    data = bytearray((tmp_path / "bad.tiff").read_bytes())
    data[at + 2 : at + 400] = bytes(398)
    (tmp_path / "bad.tiff").write_bytes(data)
    outcome = run_map(
        encode.WORKLOAD, spec(tmp_path / "good.tiff", tmp_path / "bad.tiff", encoder="noop"), tmp_path / "w"
    )
    assert outcome.failures and all(error.finding.code == "UNREADABLE" for error in outcome.failures.values())
    assert outcome.result.values["slides"] == 1


def test_a_refused_slide_is_still_a_part_of_the_last_round(tmp_path):
    write(tmp_path / "good.tiff")
    (tmp_path / "zero.svs").write_bytes(b"")
    outcome = run_map(
        encode.WORKLOAD, spec(tmp_path / "good.tiff", tmp_path / "zero.svs", encoder="noop"), tmp_path / "w"
    )
    assert [error.finding.code for error in outcome.failures.values()] == ["EMPTY_FILE"]
    assert outcome.result.values["slides"] == 1


def test_a_blocks_key_does_not_depend_on_where_the_slide_lies(slide, tmp_path):
    outcome = run_map(encode.WORKLOAD, spec(slide, encoder="noop"), tmp_path / "w")
    for item in outcome.done:
        assert str(tmp_path) not in repr((item.part.name, item.part.inputs, item.part.params))


def test_large_tiles_make_small_blocks():
    assert encode.block_size({"block": 1024, "size": 224}) == 1024
    assert encode.block_size({"block": 1024, "size": 1024}) == 53
    assert encode.block_size({"block": 8, "size": 4096}) == 3


def test_macenko_changes_what_the_encoder_sees(slide, tmp_path, mean_encoder):
    ends = [
        run_map(encode.WORKLOAD, spec(slide, encoder=mean_encoder, stain=stain), tmp_path / stain)
        for stain in ("none", "macenko")
    ]
    plain, normal = (
        features.read(end.context.out / next(iter(end.result.values["features"].values())))[1] for end in ends
    )
    assert np.abs(plain.astype(float) - normal.astype(float)).mean() > 0.01 and np.isfinite(normal).all()


def test_encoders_that_cannot_be(tmp_path, mean_encoder):
    with pytest.raises(WorkloadError, match="no encoder") as caught:
        encoders.recipe("hub/uni")
    assert "efficientnet-lite0" in caught.value.remedy
    with pytest.raises(WorkloadError, match="digest"):
        encoders.recipe({**mean_encoder, "sha256": "00" * 32})
    with pytest.raises(WorkloadError, match="not there"):
        encoders.recipe({"torchscript": str(tmp_path / "none.pt")})
    with pytest.raises(WorkloadError, match="understood"):
        encoders.recipe({"hub": "x"})
    with pytest.raises(WorkloadError, match="understood"):
        encoders.recipe({**mean_encoder, "onnx": "x"})
    with pytest.raises(WorkloadError, match="no adapter") as caught:
        encoders.recipe({"adapter": "uni3", "weights": "x"})
    assert "virchow2" in caught.value.remedy
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WorkloadError, match="safetensors"):
        encoders.recipe({"adapter": "uni", "weights": str(tmp_path / "pytorch_model.bin")})
    with pytest.raises(SpecError, match="exports"):
        encode.params_of({"exports": ["csv"]})


def test_weights_and_preprocessing_are_in_the_digest(mean_encoder):
    one, two = encoders.recipe(mean_encoder), encoders.recipe({**mean_encoder, "mean": [0.5, 0.5, 0.5]})
    assert one.digest != two.digest and one.name == two.name == "mean"


TILES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("batch", ["n", 2])
def test_an_onnx_graph_encodes(tmp_path, batch):
    helper = pytest.importorskip("onnx", reason="onnx is not installed").helper
    from onnx import TensorProto, save

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3, 1, 1])
    graph = helper.make_graph([helper.make_node("GlobalAveragePool", ["x"], ["y"])], "mean", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, tmp_path / "mean.onnx")
    made = encoders.recipe({"onnx": str(tmp_path / "mean.onnx"), "mean": [0, 0, 0], "std": [1, 1, 1]})
    seen = networks.load(made, "cpu", 1).encode(TILES)
    assert made.name.startswith("onnx-") and seen.dtype == np.float16
    assert np.allclose(seen, TILES.mean((1, 2)) / 255, atol=1e-3)


def test_an_adapters_weights_are_loaded_and_its_tokens_pooled(tmp_path):
    networks._allow_torchvision()
    pytest.importorskip("timm", reason="timm is not installed")
    from safetensors.torch import save_file

    small = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2, "reg_tokens": 4,
             "global_pool": "", "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}  # fmt: skip
    given = {"timm": "vit_tiny_patch16_224", "arguments": small, "pool": "token+mean", "prefix": 5}
    module = networks._of_timm(encoders.Recipe("x", "timm", "", None, "vit_tiny_patch16_224", small))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    made = encoders.recipe({**given, "weights": str(tmp_path / "model.safetensors")})
    encoder = networks.load(made, "cpu", 1)
    seen = encoder.encode(TILES)
    import torch

    with torch.inference_mode():
        tokens = module.eval()(encoder.front(TILES, None))
    wanted = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1).numpy()
    assert seen.shape == (5, 32) and np.allclose(seen, wanted, atol=2e-3)
    with pytest.raises(WorkloadError, match="one row per tile"):
        networks.load(encoders.recipe({**given, "pool": "", "weights": str(made.weights)}), "cpu", 1).encode(TILES)
    with pytest.raises(WorkloadError, match="fit"):
        other = {**given, "arguments": {**small, "embed_dim": 32}, "weights": str(made.weights)}
        networks.load(encoders.recipe(other), "cpu", 1)


@pytest.mark.parametrize("name", ["uni", "uni2-h", "virchow", "virchow2", "h-optimus-0"])
def test_every_adapter_is_an_architecture_that_timm_has(name):
    networks._allow_torchvision()
    pytest.importorskip("timm", reason="timm is not installed")
    import torch

    said = encoders._adapter(name)
    made = encoders.Recipe(name, "timm", "", None, said["timm"], said["arguments"])
    with torch.device("meta"):
        module = networks._of_timm(made)
    width = {"uni": 1024, "uni2-h": 1536, "virchow": 1280, "virchow2": 1280, "h-optimus-0": 1536}[name]
    registers = said["arguments"].get("reg_tokens", 0)
    assert module.num_features == width
    assert said.get("prefix", 1) == 1 + registers or not said.get("pool")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features(mean_encoder):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    made = encoders.recipe(mean_encoder)
    stain = np.eye(3) * 0.9
    one, two = (networks.load(made, device, 1).encode(TILES, stain) for device in ("cpu", "cuda:0"))
    assert np.allclose(one, two, atol=5e-3)


def test_the_shipped_encoder_knows_a_cat():
    import torch
    from PIL import Image
    from skimage import data

    made = encoders.recipe("efficientnet-lite0")
    encoder = networks.load(made, "cpu", 2)
    cat = np.asarray(Image.fromarray(data.chelsea()[:, 75:375]).resize((224, 224)))
    assert encoder.encode(np.stack([cat] * 3)).shape == (3, 1280)
    x = torch.from_numpy(cat.copy()).permute(2, 0, 1)[None] * encoder.front.scale + encoder.front.shift
    with torch.inference_mode():
        best = encoder.module.classify(x).topk(3).indices[0].tolist()
    assert set(best) <= {281, 282, 285}  # tabby, tiger cat, Egyptian cat


def test_reading_features_asks_which_where_there_are_several(tmp_path):
    for name in ("a", "b"):
        features.write_chunk(tmp_path / name, np.zeros((2, 4), np.float16), 5)
    facts = {"target_mpp": 0.5, "patch_size": 64}
    coords = np.zeros((2, 2), np.int64)
    for name in ("a", "b"):
        features.assemble(
            tmp_path / "s.zarr", coords, [tmp_path / name / features.CHUNK], block=5, dim=4, encoder=name, facts=facts
        )
    with pytest.raises(NotFoundError, match="features"):
        features.read(tmp_path / "s.zarr")
    assert features.read(tmp_path / "s.zarr", encoder="b")[1].shape == (2, 4)


def test_features_are_mapped_and_a_torn_file_is_refused(tmp_path):
    values = np.arange(28, dtype=np.float16).reshape(7, 4)
    chunks = []
    for k in (0, 3, 6):
        features.write_chunk(tmp_path / str(k), values[k : k + 3], 3)
        chunks.append(tmp_path / str(k) / features.CHUNK)
    facts = {"target_mpp": 0.5, "patch_size": 64}
    place = tmp_path / "s.zarr"
    features.assemble(place, np.zeros((7, 2)), chunks, block=3, dim=4, encoder="e", facts=facts)
    _, seen, _ = features.read(place)
    assert np.array_equal(seen, values) and not seen.flags.owndata
    seen[:] = 0  # stays with the array
    array = zarr.open_array(place / "grids/mpp0.5_px64/features/e", mode="r")
    assert np.array_equal(array[:], values) and array.chunks == (3, 4)
    file = place / "grids/mpp0.5_px64/features/e/c/0/0"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(RefusedInput, match="SHARD_DAMAGED"):
        features.read(place)


def test_importing_the_workloads_loads_nothing_heavy():
    heavy = ["torch", "zarr", "openslide", "tifffile", "pyarrow", "skimage", "scipy", "shapely", "ray", "imagecodecs"]
    code = (
        "import sys, permed_compute.workloads.pathology.encode, permed_compute.workloads.pathology.stores;"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["convert", "tiles", "encode", "segment"])
def test_the_shipped_jobs_are_valid_and_say_the_defaults(name):
    from importlib import resources
    from pathlib import Path

    from permed_compute import spec as specs
    from permed_compute.workloads.pathology import stores

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / f"pathology/{name}/job.yaml")
    check = {
        "convert": stores.params_of, "tiles": tiles.params_of, "encode": encode.params_of, "segment": segment.params_of,
    }[name]  # fmt: skip
    assert job.workload == f"pathology/{name}" and check(job.params) == check({})
