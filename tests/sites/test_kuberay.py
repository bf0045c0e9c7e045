"""Manifests for KubeRay agree with KubeRay's own schema, and with the job."""

from __future__ import annotations

import gzip
import hashlib
import json
from importlib import resources
from typing import Any

import pytest
import yaml

from permed_compute.sites import check, kuberay, profile
from permed_compute.sites.request import Choice, of
from permed_compute.spec import from_json
from tests.sites.cases import job

pytest.importorskip("jsonschema", reason="jsonschema validates the manifests")
IMAGE = Choice(image="permed:0.1.0")


def made(resources: dict[str, Any], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = job(resources, **more)
    text = kuberay.render(spec, of(spec, profile.load("kuberay"), IMAGE)).text
    config, ray_job = yaml.safe_load_all(text)
    return config, ray_job


@pytest.mark.parametrize(
    "resources",
    [{"cpus": 1}, {"cpus": 4, "memory": "9GiB", "gpus": 2, "workers": 3}, {"cpus": 0.5, "workers": "1..8"}],
)
def test_what_is_rendered_is_valid_and_says_so(resources: dict[str, Any]) -> None:
    spec = job(resources)
    rendered = kuberay.render(spec, of(spec, profile.load("kuberay"), IMAGE))
    assert rendered.validated == kuberay.SCHEMA and rendered.text.startswith(
        f"# brain: validated against {kuberay.SCHEMA}"
    )


def test_the_job_arrives_whole() -> None:
    spec = job({"cpus": 4, "gpus": 1}, inputs=["/data/scans"], params={"a": [1, 2]})
    config, _ = made({"cpus": 4, "gpus": 1}, inputs=["/data/scans"], params={"a": [1, 2]})
    assert from_json(config["data"]["job.yaml"]) == spec


def test_a_worker_is_a_pod_with_the_workers_share() -> None:
    config, ray_job = made({"cpus": 4, "memory": "9GiB", "gpus": 2, "workers": 3}, time_limit="2h")
    group = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    worker = group["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == {"cpu": "4", "memory": "9216Mi", "nvidia.com/gpu": "2"}
    assert worker["resources"]["limits"] == worker["resources"]["requests"] and worker["image"] == "permed:0.1.0"
    assert ray_job["spec"]["activeDeadlineSeconds"] == 7200
    assert ray_job["metadata"]["name"] == config["metadata"]["name"]


def test_pods_call_nobody_and_own_nothing() -> None:
    _, ray_job = made({"cpus": 1})
    cluster = ray_job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        environment = {row["name"]: row["value"] for row in pod["spec"]["containers"][0]["env"]}
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["HF_HUB_OFFLINE"] == "1"
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", ["brain", "Brain.MRI_2", "x" * 100, "1-2"])
def test_names_are_dns_labels_that_kuberay_takes(name: str) -> None:
    _, ray_job = made({"cpus": 1}, name=name)
    made_name = ray_job["metadata"]["name"]
    assert len(made_name) <= 47 and made_name[0].isalpha() and made_name.replace("-", "").isalnum()
    assert made_name == made_name.lower()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rayClusterSpecs": {}}, "rayClusterSpecs"),
        ({"backoffLimit": "none"}, "none"),
        ({"rayClusterSpec": {"rayVersion": "2.60.0"}}, "headGroupSpec"),
    ],
)
def test_what_the_schema_does_not_know_is_found(change: dict[str, Any], words: str) -> None:
    _, ray_job = made({"cpus": 1})
    ray_job["spec"] |= change
    assert any(words in problem.what for problem in kuberay.against_schema(ray_job))


def test_the_schema_is_kuberays_own() -> None:
    """Digest of the JSON that cluster/kuberay/README.md says how it was made."""
    packed = (resources.files("permed_compute.cluster") / "kuberay" / "rayjob-v1.json.gz").read_bytes()
    text = gzip.decompress(packed)
    assert hashlib.sha256(text).hexdigest() == "70a3d9fe06b37c29a8b8dcefcfd3c99864fd11a95289edc7c1472060432d3816"
    assert "rayClusterSpec" in json.loads(text)["properties"]["spec"]["properties"]


def test_without_an_image_it_is_refused() -> None:
    asked = of(job({"cpus": 1}), profile.load("kuberay"))
    assert [refusal.rule for refusal in check.refusals(asked)] == ["CONTAINER"]
