"""Unmodified bundles: MONAI's own labels; nothing untrusted runs unsealed; bad weights are refused."""

from __future__ import annotations

import importlib
import json
import pickle
import py_compile
import stat
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from permed_compute.errors import EngineError, NotFoundError, WorkloadError
from permed_compute.workloads.radiology import bundle, precision, runners, sliding
from permed_compute.workloads.radiology.bundle import Frame, Options, Plain, Variant, check
from permed_compute.workloads.radiology.runners import Sealed
from permed_compute.workloads.radiology.sliding import Decision, Windows

from .bundles import config, write_bundle

AFFINE = np.array([[0, -0.9, 0, 10.0], [0.8, 0, 0, -20], [0, 0, 2.7, 5], [0, 0, 0, 1]])
"""Axes swapped, one reversed, another spacing than the bundle's."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(40, 36, 30)), 1.5)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 8000).astype(np.int16)


def image(folder: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.Nifti1Image(values, affine).to_filename(folder / "image.nii")
    return folder / "image.nii"


def plain(root: Path, scratch: Path, options: Options = Options()) -> Plain:
    return Plain(root, options, device="cpu", threads=1, scratch=scratch)


def run(runner, folder, values, variant=Variant(), affine=AFFINE):
    return runner.segment(image(folder, values, affine), values.shape, affine, variant)


def whole(runner: Plain, folder, values) -> np.ndarray:
    """As MONAI's evaluator does it: all logits, then the bundle's own postprocessing."""
    decision, runner.decision = runner.decision, None
    try:
        done = run(runner, folder, values)
    finally:
        runner.decision = decision
    assert not done.streamed
    return done.labels


# ------------------------------------------------------------------------------------------------ labels


def steps(*rows):
    return {"_target_": "Compose", "transforms": list(rows)}


INVERT = {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"}
LATE = steps(
    {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}, INVERT | {"nearest_interp": True, "to_tensor": True}
)
SIGMOID = steps(
    {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}, INVERT | {"nearest_interp": False},
    {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5},
)  # fmt: skip
GAUSSIAN = {
    "_target_": "SlidingWindowInferer", "roi_size": [16, 24, 16], "sw_batch_size": 1, "overlap": [0.5, 0.25, 0.6],
    "mode": "gaussian", "padding_mode": "replicate",
}  # fmt: skip


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(postprocessing=LATE),
        config(1, postprocessing=SIGMOID, inferer=GAUSSIAN),
        config(inferer={"_target_": "SimpleInferer"}),
    ],
    ids=["softmax, resampled, argmax", "argmax, then nearest", "one channel, sigmoid, gaussian", "one window"],
)
def test_streamed_labels_are_those_of_monais_own_pipeline(made, values, tmp_path):
    runner = plain(write_bundle(tmp_path / "b", made), tmp_path)
    done = run(runner, tmp_path, values)
    expected = whole(runner, tmp_path, values)
    assert done.streamed and not done.shrunk and done.labels.shape == values.shape
    assert (done.labels != expected).sum() <= 1e-6 * values.size
    assert len(np.unique(expected)) > 1


def test_what_cannot_be_streamed_runs_as_monai_would(values, tmp_path):
    post = config()["postprocessing"]
    post["transforms"].append({"_target_": "KeepLargestConnectedComponentd", "keys": "pred"})
    runner = plain(write_bundle(tmp_path / "b", config(postprocessing=post)), tmp_path)
    done = run(runner, tmp_path, values)
    assert not done.streamed and done.labels.shape == values.shape and done.network_s > 0


def test_an_ensemble_and_flips_are_means_of_logits(values, tmp_path):
    root = write_bundle(tmp_path / "b", config(), seeds=(0, 7))
    names = ("models/model.pt", "models/model1.pt")
    one, two, both = (plain(root, tmp_path, Options(w)) for w in (names[:1], names[1:], names))
    x = torch.rand(1, 1, 16, 16, 16)
    first, second, mean = (runner._predictor("eager") for runner in (one, two, both))
    with torch.inference_mode():
        assert torch.allclose(mean(x), (first(x) + second(x)) / 2, atol=1e-6)
        assert not torch.allclose(first(x), second(x), atol=1e-2)
    turned = plain(root, tmp_path, Options(flips=((0,), (1, 2))))
    assert (run(turned, tmp_path, values).labels != run(one, tmp_path, values).labels).any()


@pytest.mark.parametrize(
    ("post", "expected"),
    [
        (None, (Decision(), False)),
        (config()["postprocessing"], (Decision("argmax", "softmax"), False)),
        (LATE, (Decision(), True)),
        (SIGMOID, (Decision("threshold", "sigmoid", 0.5), False)),
        ("$lambda x: x", (None, False)),
        (steps("$print"), (None, False)),
        (steps({"_target_": "AsDiscreted", "argmax": True}), (None, False)),
        (steps({"_target_": "scripts.mine.Clean"}, *config()["postprocessing"]["transforms"]), (None, False)),
        (steps(INVERT, {"_target_": "AsDiscreted", "argmax": True}), (None, False)),
    ],
)
def test_only_postprocessing_that_is_understood_is_replaced(post, expected):
    assert bundle._decision(post) == expected


def test_a_turned_grid_is_refused():
    c, s = np.cos(0.1), np.sin(0.1)
    turned = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    with pytest.raises(WorkloadError, match="not parallel"):
        Frame.of(turned, (10, 10, 10), np.eye(4), (10, 10, 10))


def test_windows_shrink_where_memory_does_not_suffice(values, tmp_path):
    runner = plain(write_bundle(tmp_path / "b", config(roi=32)), tmp_path)
    eager = runner._clock(Variant()).predict

    def hungry(x):
        if x[:, 0].numel() > 16 * 32 * 32:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return eager(x)

    runner._clocks["eager"].predict = hungry
    done = run(runner, tmp_path, values)
    assert done.shrunk and done.windows == (16, 32, 32)


# ------------------------------------------------------------------------------------------------ what is refused


def test_the_digest_covers_every_file(tmp_path):
    root = write_bundle(tmp_path / "b", config())
    before = check(root).digest
    assert check(root, expected=before).digest == before
    (root / "scripts").mkdir()
    (root / "scripts" / "more.py").write_text("")
    assert check(root).digest != before
    with pytest.raises(WorkloadError, match="digest"):
        check(root, expected=before)


class Code:
    def __reduce__(self):
        return (print, ("run",))


def test_weights_that_are_not_what_they_should_be_are_refused(tmp_path, capsys):
    root = write_bundle(tmp_path / "b", config())
    weights = root / "models" / "model.pt"
    (root / "large_files.yml").write_text(
        json.dumps({"large_files": [{"path": "models/model.pt", "hash_type": "sha256", "hash_val": "0" * 64}]})
    )
    with pytest.raises(WorkloadError, match="large_files"):
        check(root)
    (root / "large_files.yml").unlink()
    weights.write_bytes(pickle.dumps(Code()))
    with pytest.raises(WorkloadError, match="bare pickle"):
        check(root)
    torch.save({"model": Code()}, weights)
    with pytest.raises(WorkloadError, match="pickled objects"):
        plain(check(root).root, tmp_path)
    torch.save({"other": torch.zeros(3)}, weights)
    with pytest.raises(WorkloadError, match="does not fit"):
        plain(root, tmp_path)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(WorkloadError):
        check(root)
    weights.unlink()
    with pytest.raises(NotFoundError):
        check(root)
    assert "run" not in capsys.readouterr().out


def test_a_folder_that_is_no_bundle_or_links_out_of_itself(tmp_path):
    with pytest.raises(NotFoundError):
        check(tmp_path)
    root = write_bundle(tmp_path / "b", config())
    (root / "key").symlink_to("/etc/hostname")
    with pytest.raises(WorkloadError, match="links out"):
        check(root)


def test_a_bundle_without_a_network_is_named(tmp_path):
    made = config()
    root = write_bundle(tmp_path / "b", made)
    del made["network_def"]
    (root / bundle.CONFIG).write_text(json.dumps(made))
    with pytest.raises(WorkloadError, match="no network_def"):
        plain(root, tmp_path)


def test_a_bundles_code_is_what_its_digest_is_of(tmp_path, monkeypatch):
    """Not a compiled file that says something else of the same source."""
    root = write_bundle(tmp_path / "b", config())
    monkeypatch.setattr(sys, "path", list(sys.path))
    code = root / "own_code.py"
    code.write_text("SAYS = 'cached'\n")
    py_compile.compile(str(code), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    code.write_text("SAYS = 'source'\n")
    plain(root, tmp_path)
    assert importlib.import_module("own_code").SAYS == "source"


# ------------------------------------------------------------------------------------------------ sealed

NAUGHTY = """
import json, os, socket, subprocess
from pathlib import Path
from monai.networks.nets import UNet

def tried(act):
    try:
        act()
        return "allowed"
    except BaseException as error:
        return type(error).__name__

outside = Path(__file__).parents[2]
made = {
    "socket": tried(lambda: socket.socket()),
    "unix socket": tried(lambda: socket.socket(socket.AF_UNIX)),
    "write outside": tried(lambda: (outside / "planted").write_text("x")),
    "write to the bundle": tried(lambda: Path(__file__).with_name("planted.py").write_text("x")),
    "write by a child": tried(lambda: subprocess.run(["touch", str(outside / "planted")], check=True)),
    "change a mode": tried(lambda: os.chmod(__file__, 0o777)),
    "read a secret": tried(lambda: (outside / "secret").read_text()),
    "signal the parent": tried(lambda: os.kill(os.getppid(), 0)),
    "read the parent": tried(lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes()),
    "a variable": os.environ.get("PERMED_TEST_TOKEN", "not there"),
    "write to its folder": tried(lambda: Path("mine").write_text("x")),
}
Path("tried.json").write_text(json.dumps(made))
"""


def test_what_nobody_vouches_for_runs_sealed_and_to_the_same_labels(values, tmp_path, monkeypatch):
    monkeypatch.setenv("PERMED_TEST_TOKEN", "secret")
    (tmp_path / "secret").write_text("secret")
    made = config()
    made["network_def"] = made["network_def"] | {"_target_": "scripts.naughty.UNet"}
    root = write_bundle(tmp_path / "b", made)
    (root / "scripts").mkdir()
    (root / "scripts" / "__init__.py").touch()
    (root / "scripts" / "naughty.py").write_text(NAUGHTY)
    runner = runners.open_bundle(check(root), Options(), device="cpu", threads=1, scratch=tmp_path)
    try:
        assert isinstance(runner, Sealed)
        found = run(runner, tmp_path, values).labels
        again = run(runner, tmp_path, values).labels
        runner._process.kill()
        with pytest.raises(WorkloadError, match="sealed"):
            runner._ask({"tolerance": 0})
        third = run(runner, tmp_path, values).labels
    finally:
        runner.close()
    tried = json.loads((runner.folder / "tried.json").read_text())
    assert tried.pop("write to its folder") == "allowed" and tried.pop("a variable") == "not there"
    assert set(tried.values()) <= {"PermissionError", "CalledProcessError"}, tried
    assert not (tmp_path / "planted").exists()
    assert np.array_equal(found, again) and np.array_equal(found, third), "it is started again after a study broke it"
    made["network_def"] = config()["network_def"]
    (root / bundle.CONFIG).write_text(json.dumps(made))
    assert np.array_equal(found, whole(plain(root, tmp_path), tmp_path, values))


def fake_python(tmp_path: Path, monkeypatch, script: str) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(stand_in))


def test_where_sealing_is_not_possible_nothing_runs(tmp_path, monkeypatch):
    root = write_bundle(tmp_path / "b", config())
    fake_python(tmp_path, monkeypatch, "echo 'not sealed: the kernel has Landlock version 0' >&2; exit 97")
    with pytest.raises(EngineError, match=r"cannot seal.*Landlock version 0"):
        runners.open_bundle(check(root), Options(), device="cpu", threads=1, scratch=tmp_path)


@pytest.mark.parametrize("script", ["exit 1", "kill -9 $$", "read x; echo nonsense >&0; exit 0"])
def test_a_sealed_process_that_breaks_is_a_named_failure(tmp_path, monkeypatch, script):
    root = write_bundle(tmp_path / "b", config())
    fake_python(tmp_path, monkeypatch, script)
    with pytest.raises(WorkloadError, match="sealed bundle ended"):
        runners.open_bundle(check(root), Options(), device="cpu", threads=1, scratch=tmp_path)


def test_a_process_with_threads_is_not_sealed():
    import subprocess

    code = (
        "import threading, time; threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
        "from pathlib import Path; from permed_compute.workloads.radiology import sealed\n"
        "raise SystemExit(sealed.main(['/tmp', '--', 'this']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert ran.returncode == 97 and "other threads" in ran.stderr


def test_an_operators_list_lets_a_digest_run_here(tmp_path, monkeypatch):
    root = write_bundle(tmp_path / "b", config())
    checked = check(root)
    listed = tmp_path / "bundles.yaml"
    listed.write_text(f"allowed:\n  {checked.digest}: made for a test\n")
    monkeypatch.setenv(bundle.ALLOWED, str(listed))
    assert isinstance(runners.open_bundle(checked, Options(), device="cpu", threads=1, scratch=tmp_path), Plain)
    listed.write_text("allowed: [")
    with pytest.raises(WorkloadError, match="cannot be read"):
        bundle.allowed()


# ------------------------------------------------------------------------------------------------ variants


def shifted(by: float):
    return lambda x: torch.cat((x, x * 0 + by), 1)


def test_the_fastest_variant_within_the_tolerance_is_chosen():
    took = iter(range(1000))
    spent = {"eager": 10.0, "jit": 4.0, "compile": 3.0, "bf16": 1.0}
    now = [0.0]

    def timed(name, predict):
        def call(x):
            now[0] += spent[name]
            return predict(x)

        return call

    def absent(x):
        raise OSError("no compiler")

    variants = {name: timed(name, shifted(0.1)) for name in ("eager", "jit")}
    variants |= {"compile": absent, "bf16": timed("bf16", shifted(0.4))}
    x = precision.probe(1, (16, 16, 16), "cpu")
    choice = precision.choose(variants, x, tolerance=1e-3, machine="m", clock=lambda: now[0])
    assert choice.variant == "jit" and choice.seconds == {"eager": 10.0, "jit": 4.0, "bf16": 1.0}
    assert choice.differing["bf16"] > 1e-3 and "compile" not in choice.differing
    spent["jit"] = 9.5
    assert precision.choose(variants, x, tolerance=1e-3, machine="m", clock=lambda: now[0]).variant == "eager"
    assert precision.choose(variants, x, tolerance=0.9, machine="m", clock=lambda: now[0]).variant == "bf16"
    assert next(took) == 0


@pytest.mark.parametrize("variant", ["jit", "bf16"])
def test_variants_stay_within_a_stated_tolerance_of_eager(variant, values, tmp_path):
    runner = plain(write_bundle(tmp_path / "b", config()), tmp_path)
    eager = run(runner, tmp_path, values).labels
    other = run(runner, tmp_path, values, Variant(variant, runner.machine, 1e-4)).labels
    assert (other != eager).mean() <= (1e-4 if variant == "jit" else 0.02)


def test_a_variant_from_another_machine_must_show_its_labels_first(values, tmp_path):
    runner = plain(write_bundle(tmp_path / "b", config()), tmp_path)
    with pytest.raises(WorkloadError, match="differs from eager"):
        run(runner, tmp_path, values, Variant("bf16", "another machine", 1e-7))
    assert run(runner, tmp_path, values, Variant("jit", "another machine", 1e-3)).streamed


def test_there_is_no_other_variant():
    with pytest.raises(WorkloadError, match="no precision variant"):
        precision.apply(torch.nn.Identity(), "int3", "cpu")


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
def test_on_a_gpu_the_labels_are_those_of_the_cpu(values, tmp_path):
    root = write_bundle(tmp_path / "b", config())
    cpu = run(plain(root, tmp_path), tmp_path, values).labels
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for keep in (sliding.KEEP_BYTES, 0):
        runner = Plain(root, Options(keep_bytes=keep), device="cuda:0", threads=1, scratch=tmp_path)
        assert (run(runner, tmp_path, values).labels != cpu).mean() <= 1e-4


@pytest.mark.gpu
def test_on_a_gpu_too_little_memory_gives_smaller_windows():
    total = torch.cuda.get_device_properties(0).total_memory
    network = torch.nn.Conv3d(1, 2, 1).cuda()
    x = torch.rand(1, 64, 64, 64, device="cuda:0")

    def hungry(v):
        if v.shape[2] > 32:
            torch.empty(total * 2, dtype=torch.uint8, device="cuda:0")
        return network(v)

    windows = Windows((64, 64, 64))
    found, used = sliding.fitting(windows, lambda w: sliding.labels(x, hungry, w))
    assert used.roi_size[0] <= 32 and np.array_equal(found, sliding.labels(x, network, windows))
