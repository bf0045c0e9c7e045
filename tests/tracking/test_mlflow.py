"""The MLflow adapter on its embedded store and against a real `mlflow server` on loopback."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from permed_compute.errors import EngineError
from permed_compute.paths import HomePaths
from permed_compute.testing.ports import free_port
from permed_compute.tracking.files import Spool, drain
from permed_compute.tracking.mlflow import MlflowTracker, embedded
from permed_compute.tracking.port import RunRecord

pytest.importorskip("mlflow", reason="mlflow is not installed (extra: tracking)")
pytestmark = pytest.mark.slow


class MlflowServer:
    """`mlflow server` on a loopback port; its store outlives a stop."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=quiet, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        self.stop()
        pytest.fail("mlflow server did not come up:\n" + (self.folder / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server of this module, not yet started: the first test that uses it meets it down."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-server"))
    yield server
    server.stop()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "parts" / "series-1").mkdir(parents=True)
    (folder / "index.html").write_text("<p>page</p>")
    (folder / "parts" / "series-1" / "mask.nii.gz").write_bytes(b"\x1f\x8bmask")
    return folder


@pytest.fixture
def record(results: Path) -> RunRecord:
    return RunRecord(
        job_id=f"job-{os.urandom(4).hex()}",
        name="brain of one head",
        experiment="radiology/brain-extraction",
        state="PARTIAL",
        started_at=1_700_000_000_000,
        ended_at=1_700_000_020_000,
        params={"seed": 0, "device": "cpu", "long (mm)": "x" * 7000, "flavors": ["h100", "cpu"]},
        metrics={"dice": [(0, 0.5, 1_700_000_001_000), (1, 0.75, 1_700_000_002_000)], "wall_s": [(0, 20.5, 1)]},
        tags={"permed.account": "local"},
        artifacts=[str(results / "index.html"), str(results / "parts")],
    )


def client_of(uri: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def runs_of(uri: str, record: RunRecord) -> list:
    client = client_of(uri)
    experiment = client.get_experiment_by_name(record.experiment)
    return client.search_runs([experiment.experiment_id], f"tags.`permed.job` = '{record.job_id}'")


def files_of(client, run_id: str, path: str | None = None) -> set[str]:
    found = set()
    for item in client.list_artifacts(run_id, path):
        found |= files_of(client, run_id, item.path) if item.is_dir else {item.path}
    return found


def assert_complete(uri: str, record: RunRecord) -> None:
    """The one run of the record says all that the record says."""
    [run] = runs_of(uri, record)
    assert run.info.run_name == record.name
    assert (run.info.start_time, run.info.end_time) == (record.started_at, record.ended_at)
    assert run.info.status == "FINISHED"
    assert run.data.tags["permed.state"] == "PARTIAL"
    assert run.data.tags["permed.account"] == "local"
    assert run.data.params["device"] == "cpu"
    assert run.data.params["flavors"] == '["h100", "cpu"]'
    assert len(run.data.params["long _mm_"]) == 6000
    client = client_of(uri)
    history = client.get_metric_history(run.info.run_id, "dice")
    assert [(point.step, point.value, point.timestamp) for point in history] == list(record.metrics["dice"])
    assert files_of(client, run.info.run_id) == {"index.html", "parts/series-1/mask.nii.gz"}


def test_embedded_everything_is_read_back_and_private(
    home: HomePaths, record: RunRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tracker = embedded(home)
    where = tracker.send(record)
    assert_complete(tracker.uri, record)
    assert runs_of(tracker.uri, record)[0].info.run_id in where
    assert (home.mlflow.stat().st_mode & 0o777, (home.mlflow / "artifacts").stat().st_mode & 0o777) == (0o700, 0o700)
    assert list((home.mlflow / "artifacts").rglob("mask.nii.gz"))
    assert list((tmp_path / "here").iterdir()) == [], "nothing may fall into the folder one happens to stand in"


def test_sending_twice_changes_nothing(home: HomePaths, record: RunRecord) -> None:
    tracker = embedded(home)
    first = tracker.send(record)
    [before] = runs_of(tracker.uri, record)
    assert tracker.send(record) == first
    assert embedded(home).send(record) == first
    assert [run.to_dictionary() for run in runs_of(tracker.uri, record)] == [before.to_dictionary()]
    assert_complete(tracker.uri, record)


def bundled(record: RunRecord, results: Path) -> RunRecord:
    """The record of a training that left a bundle with its card."""
    (results / "bundle" / "docs").mkdir(parents=True)
    (results / "bundle" / "docs" / "README.md").write_text("# lesions\nDice 0.87 of held-out patients\n")
    tags = {"permed.digest": "d" * 64, "permed.job": record.job_id, "permed.legal_entity": "ous"}
    name = f"helse:ous/lesions-{record.job_id}"
    card = "# lesions\n" + "x" * 6000
    model = {"name": name, "folder": "bundle", "digest": "d" * 64, "card": card, "tags": tags}
    return replace(record, artifacts=[*record.artifacts, str(results / "bundle")], models=(model,))


def assert_registered(uri: str, record: RunRecord, tmp_path: Path) -> None:
    """One version, with its card, its digest, and the run's own files."""
    import mlflow

    client, [run] = client_of(uri), runs_of(uri, record)
    name = f"helse.ous.lesions-{record.job_id}"
    [version] = client.search_model_versions(f"name = '{name}'")
    assert version.run_id == run.info.run_id and version.tags["permed.digest"] == "d" * 64
    assert version.tags["permed.legal_entity"] == "ous" and version.description.startswith("# lesions")
    assert len(version.description) == 5000, "MLflow's column"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        card = mlflow.artifacts.download_artifacts(f"models:/{name}/1/docs/README.md", dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(before)
    assert "held-out patients" in Path(card).read_text()


def test_a_trained_bundle_is_a_version_in_the_registry_with_its_card(
    home: HomePaths, record: RunRecord, results: Path, tmp_path: Path
) -> None:
    made = bundled(record, results)
    tracker = embedded(home)
    tracker.send(made)
    tracker.send(made)
    tracker.send(replace(made, tags={"permed.account": "changed"}))
    (tmp_path / "down").mkdir()
    assert_registered(tracker.uri, made, tmp_path / "down")


def test_a_sending_that_broke_off_is_completed(
    home: HomePaths, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    tracker = embedded(home)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "set_terminated", lambda *a, **k: (_ for _ in ()).throw(ConnectionError()))
        with pytest.raises(EngineError):
            tracker.send(record)
    [run] = runs_of(tracker.uri, record)
    assert run.info.status == "RUNNING"
    tracker.send(record)
    assert_complete(tracker.uri, record)


def test_a_resumed_job_completes_its_one_run(home: HomePaths, record: RunRecord) -> None:
    tracker = embedded(home)
    tracker.send(replace(record, state="FAILED"))
    assert runs_of(tracker.uri, record)[0].info.status == "FAILED"
    later = replace(
        record,
        state="PARTIAL",
        ended_at=record.ended_at + 1000,
        params={**record.params, "device": "cuda:0"},
    )
    tracker.send(later)
    [run] = runs_of(tracker.uri, record)
    assert (run.info.status, run.info.end_time) == ("FINISHED", later.ended_at)
    assert run.data.params["device"] == "cpu"  # MLflow keeps a parameter's first value for ever
    assert run.data.tags["permed.changed.device"] == "cuda:0"


@pytest.mark.parametrize(
    ("state", "status"),
    [("SUCCEEDED", "FINISHED"), ("FAILED", "FAILED"), ("TIMED_OUT", "FAILED"), ("CANCELLED", "KILLED")],
)
def test_the_status_follows_the_state(home: HomePaths, record: RunRecord, state: str, status: str) -> None:
    tracker = embedded(home)
    tracker.send(replace(record, state=state, artifacts=()))
    [run] = runs_of(tracker.uri, record)
    assert (run.info.status, run.data.tags["permed.state"]) == (status, state)


def test_many_points_and_params_and_values_that_are_not_numbers(home: HomePaths, record: RunRecord) -> None:
    tracker = embedded(home)
    big = replace(
        record,
        params={f"p{i}": i for i in range(250)},
        metrics={"loss": [(i, float(i), i) for i in range(2500)], "odd": [(0, math.nan, 0)]},
        tags={f"t{i}": "v" * 9000 for i in range(130)},
    )
    tracker.send(big)
    [run] = runs_of(tracker.uri, record)
    assert len(run.data.params) == 250
    assert len(client_of(tracker.uri).get_metric_history(run.info.run_id, "loss")) == 2500
    assert math.isnan(run.data.metrics["odd"])
    assert len(run.data.tags["t129"]) == 8000


def test_links_and_files_that_have_gone_are_left_out_and_counted(
    home: HomePaths, record: RunRecord, results: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not ours")
    (results / "parts" / "link").symlink_to(secret)
    tracker = embedded(home)
    tracker.send(replace(record, artifacts=[*record.artifacts, str(results / "gone.txt")]))
    [run] = runs_of(tracker.uri, record)
    assert run.data.tags["permed.artifacts_left_out"] == "2"
    assert files_of(client_of(tracker.uri), run.info.run_id) == {"index.html", "parts/series-1/mask.nii.gz"}


def test_a_server_that_is_down_is_named_without_its_password(record: RunRecord) -> None:
    with pytest.raises(EngineError) as caught:
        MlflowTracker(f"http://user:hush@127.0.0.1:{free_port()}").send(record)
    assert "127.0.0.1" in str(caught.value) and "hush" not in str(caught.value)
    assert caught.value.remedy


def test_a_server_that_takes_calls_and_never_answers_is_given_up(record: RunRecord) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EngineError):
            MlflowTracker(f"http://127.0.0.1:{silent.getsockname()[1]}").send(record)


def test_our_time_outs_do_not_leak_into_the_environment(home: HomePaths, record: RunRecord) -> None:
    embedded(home).send(record)
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_server_down_then_up_each_record_is_there_once(
    mlflow_server: MlflowServer, home: HomePaths, record: RunRecord
) -> None:
    spool, tracker = Spool(home.spool), MlflowTracker(mlflow_server.uri)
    spool.put(record)
    down = drain(spool, tracker)
    assert (down.sent, down.left) == (0, 1)
    assert mlflow_server.uri in down.error and "will be sent later" in down.error

    mlflow_server.start()
    up = drain(spool, tracker)
    assert (up.sent, up.left, up.error) == (1, 0, "")
    assert up.found_at[0].startswith(f"{mlflow_server.uri}/#/experiments/")
    assert_complete(mlflow_server.uri, record)

    spool.put(record)  # the controller died before it noted the sending
    assert drain(spool, MlflowTracker(mlflow_server.uri)).sent == 1
    assert_complete(mlflow_server.uri, record)
    assert list((mlflow_server.folder / "artifacts").rglob("mask.nii.gz")), "artefacts went through the server"


def test_the_server_dies_and_comes_back_within_one_process(
    mlflow_server: MlflowServer, home: HomePaths, record: RunRecord
) -> None:
    if mlflow_server.process is None:
        mlflow_server.start()
    spool, tracker = Spool(home.spool), MlflowTracker(mlflow_server.uri)
    tracker.send(replace(record, job_id="job-before"))
    mlflow_server.stop()
    spool.put(record)
    assert drain(spool, tracker).left == 1
    mlflow_server.start()
    assert drain(spool, tracker).left == 0
    assert_complete(mlflow_server.uri, record)


def test_a_server_registers_a_trained_bundle_too(
    mlflow_server: MlflowServer, record: RunRecord, results: Path, tmp_path: Path
) -> None:
    if mlflow_server.process is None:
        mlflow_server.start()
    made = bundled(record, results)
    MlflowTracker(mlflow_server.uri).send(made)
    (tmp_path / "down").mkdir()
    assert_registered(mlflow_server.uri, made, tmp_path / "down")
