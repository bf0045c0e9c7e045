"""Runs in MLflow: an embedded store (SQLite and a folder in the home) or a server by URI. Nothing else imports mlflow.

mlflow is imported inside functions: its import takes 3 s (1,165 modules), which `permed --help` must not pay.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from permed_compute.errors import EngineError, PermedError
from permed_compute.offline import NO_TELEMETRY
from permed_compute.paths import HomePaths
from permed_compute.tracking.port import RecordRefusedError, RunRecord

JOB_TAG = "permed.job"
"""A run is found again by it: one run per job, however often its record is sent."""
STATE_TAG = "permed.state"
DIGEST_TAG = "permed.digest"
"""Of a registered version: the bundle's, by which the gate to clinical use knows it."""
_SENT_TAG = "permed.record"  # digest of the record that was sent completely; written last

_STATUS = {"SUCCEEDED": "FINISHED", "PARTIAL": "FINISHED", "CANCELLED": "KILLED"}  # everything else: FAILED

# mlflow.utils.validation of 3.17.2
_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 8000, 250
_CARD_LENGTH = 5000  # the column of a version's description; the whole card is docs/README.md of its artifacts
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100

_PROBE_SECONDS = 3.0
# A job never waits long for tracking: the defaults (7 retries, 120 s each) would hold a dead server for minutes.
# What the user has set stands.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def embedded(home: HomePaths) -> MlflowTracker:
    """The default: `HOME/mlflow/mlflow.db`, artifacts in `HOME/mlflow/artifacts` (both private)."""
    return MlflowTracker(f"sqlite:///{home.mlflow / 'mlflow.db'}", home.mlflow / "artifacts")


class MlflowTracker:
    """A `Tracker` on MLflow.

    uri: `sqlite:///…`, `postgresql://…` or `http(s)://…`. artifact_root: folder for new experiments' artifacts; None
    leaves it to the server (which then has to be started with `--artifacts-destination` or a root of its own).
    """

    def __init__(self, uri: str, artifact_root: Path | None = None) -> None:
        self.uri = uri
        self.artifact_root = artifact_root
        self._client: Any = None

    def send(self, record: RunRecord) -> str:
        """Create or complete the run of that job. Returns the page of a server, or the store and the run's id.

        Raises `EngineError` (down, or mlflow is not installed) and `RecordRefusedError`.
        """
        with _environment(), _translated(self.uri):
            self._probe()
            client = self._connect()
            experiment = self._experiment(client, record.experiment or "permed")
            run = self._run(client, experiment, record)
            digest = _digest(record)
            if run.data.tags.get(_SENT_TAG) != digest:
                self._fill(client, run, record)
                for model in record.models:
                    _register(client, run, model)
                client.set_tag(run.info.run_id, _SENT_TAG, digest)
            return self._where(experiment, run.info.run_id)

    def _probe(self) -> None:
        """One short request first, so that a dead server costs seconds, whatever the requests after it may take."""
        if not self.uri.startswith(("http://", "https://")):
            return
        import requests

        # Any answer at all is a sign of life; what it means, the real requests will find out.
        requests.get(f"{self.uri.rstrip('/')}/health", timeout=_PROBE_SECONDS, allow_redirects=False).close()

    def _connect(self) -> Any:
        if self._client is None:
            try:
                from mlflow.tracking import MlflowClient
            except ImportError:
                raise EngineError(
                    "MLflow is not installed here.",
                    remedy="Install it with `pip install 'permed-compute[tracking]'`, or set tracking_uri: none.",
                ) from None
            for folder in self._own_folders():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._client

    def _own_folders(self) -> Iterator[Path]:
        if self.uri.startswith("sqlite:///"):
            yield Path(self.uri.removeprefix("sqlite:///")).parent
        if self.artifact_root is not None:
            yield self.artifact_root

    def _experiment(self, client: Any, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            location = self.artifact_root.resolve().as_uri() if self.artifact_root else None
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # somebody else was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise RecordRefusedError(
                f"The experiment {name!r} has been deleted in MLflow.",
                remedy=f"Restore it with `mlflow experiments restore -x {found.experiment_id}`, or purge it.",
            )
        return str(found.experiment_id)

    def _run(self, client: Any, experiment: str, record: RunRecord) -> Any:
        runs = client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{record.job_id}'", max_results=1)
        if runs:
            return runs[0]
        tags = {JOB_TAG: record.job_id}
        return client.create_run(experiment, start_time=record.started_at, tags=tags, run_name=record.name)

    def _fill(self, client: Any, run: Any, record: RunRecord) -> None:
        from mlflow.entities import Metric, Param, RunTag

        run_id = run.info.run_id
        params = {_key(name): _text(value, _PARAM_LENGTH) for name, value in record.params.items()}
        # A parameter of a run never changes in MLflow; what a later attempt had different is told by a tag.
        changed = {name: value for name, value in params.items() if run.data.params.get(name, value) != value}
        new = [Param(name, value) for name, value in params.items() if name not in run.data.params]
        points = [
            Metric(_key(name), value, at, step) for name, series in record.metrics.items() for step, value, at in series
        ]
        tags = {_key(name): str(value) for name, value in record.tags.items()}
        tags |= {_key(f"permed.changed.{name}"): value for name, value in changed.items()}
        tags |= {STATE_TAG: record.state}
        for some in _chunks(new, _PARAMS_AT_ONCE):
            client.log_batch(run_id, params=some)
        for some in _chunks(points, _METRICS_AT_ONCE):
            client.log_batch(run_id, metrics=some)
        left_out = _send_artifacts(client, run_id, record.artifacts)
        if left_out:
            tags["permed.artifacts_left_out"] = str(left_out)
        for some in _chunks([RunTag(name, value[:_TAG_LENGTH]) for name, value in tags.items()], _PARAMS_AT_ONCE):
            client.log_batch(run_id, tags=some)
        client.set_terminated(run_id, status=_STATUS.get(record.state, "FAILED"), end_time=record.ended_at)

    def _where(self, experiment: str, run_id: str) -> str:
        if self.uri.startswith(("http://", "https://")):
            return f"{_shown(self.uri).rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
        return f"{_shown(self.uri)} run {run_id}"


def _register(client: Any, run: Any, model: Mapping[str, Any]) -> None:
    """A version of the registered model: the run's folder, its card as description. Once per run and digest."""
    from mlflow.exceptions import MlflowException

    name = re.sub(r"[/:]", ".", model["name"])[:_KEY_LENGTH]
    try:
        client.create_registered_model(name, tags={JOB_TAG: model["tags"][JOB_TAG]})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'")
    if any(version.tags.get(DIGEST_TAG) == model["digest"] for version in known):
        return
    source = f"{run.info.artifact_uri.rstrip('/')}/{model['folder']}"
    client.create_model_version(
        name, source, run.info.run_id, description=_text(model["card"], _CARD_LENGTH),
        tags={_key(key): str(value)[:_TAG_LENGTH] for key, value in model["tags"].items()},
    )  # fmt: skip


def _send_artifacts(client: Any, run_id: str, artifacts: Sequence[str]) -> int:
    """Copy files and folders, keeping their places below the folder they share. Returns how many were left out:
    gone since (`permed gc`), links (they may lead out of the results), names that MLflow does not take."""
    from mlflow.exceptions import MlflowException

    given = [Path(path) for path in artifacts]
    base = Path(os.path.commonpath([path.parent for path in given])) if given else Path()
    left_out = 0
    for file in (file for path in given for file in _files(path)):
        place = file.parent.relative_to(base).as_posix()
        try:
            if file.is_symlink() or not file.is_file():
                left_out += 1
            else:
                client.log_artifact(run_id, str(file), None if place == "." else place)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            left_out += 1
    return left_out


def _files(path: Path) -> Iterable[Path]:
    if path.is_symlink() or not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while some := list(islice(iterator, size)):
        yield some


def _key(name: str) -> str:
    """A name MLflow takes: letters, digits, `_ - . : /` and spaces, no path that climbs, at most 250 characters."""
    name = re.sub(r"[^\w\-. :/]", "_", name)
    name = "/".join(piece for piece in name.split("/") if piece.strip(". ")) or "_"
    if len(name) <= _KEY_LENGTH:
        return name
    return f"{name[: _KEY_LENGTH - 9]}~{sha256(name.encode()).hexdigest()[:8]}"


def _text(value: Any, length: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _digest(record: RunRecord) -> str:
    parts: Mapping[str, Any] = {
        name: getattr(record, name)
        for name in ("state", "ended_at", "params", "metrics", "tags", "artifacts", "models")
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# --------------------------------------------------------------------------------------------- the foreign edge

_ENVIRONMENT = threading.RLock()


@contextmanager
def _environment() -> Iterator[None]:
    """mlflow reads its settings from the environment at each call: ours hold inside the block only, so that no process
    started elsewhere inherits them. Telemetry stays off for good (mlflow's thread for it starts at import)."""
    with _ENVIRONMENT:
        os.environ.update(NO_TELEMETRY)
        ours = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name in ours:
                os.environ.pop(name, None)


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """mlflow, requests, SQLAlchemy and the file system: their errors leave as ours, without the URI's password."""
    try:
        yield
    except PermedError:
        raise
    except Exception as error:  # noqa: BLE001 - a foreign edge: mlflow's plugins raise what they like
        code = getattr(error, "error_code", "")
        first_line = (str(error).strip().splitlines() or [""])[0][:200].replace(uri, _shown(uri))
        if code in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}:
            raise RecordRefusedError(
                f"MLflow at {_shown(uri)} refuses the record: {first_line}",
                remedy="The job's results are complete without it.",
            ) from None
        kind = f"{error.__class__.__name__} {code}".strip()
        raise EngineError(
            f"MLflow at {_shown(uri)} does not answer as it should ({kind}).",
            remedy="Start it, or correct tracking_uri (`permed doctor` shows where it is set).",
        ) from None


def _shown(uri: str) -> str:
    """The URI without user and password."""
    return re.sub(r"://[^/@]*@", "://", uri)
