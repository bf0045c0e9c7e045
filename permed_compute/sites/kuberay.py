"""A job as manifests for KubeRay: a ConfigMap with the job file, and a RayJob with one pod per worker.

The head pod runs `permed run` against the Ray around it; home, ledger and results lie on one volume claim. Shapes
follow KubeRay's RayJob CRD (ray.io/v1), against which `render` validates. What the cluster itself adds (quotas,
webhooks, network policies) is not known here. No manifest of ours has been run on a cluster yet.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from typing import Any

from permed_compute.errors import Problem, SettingsError, SpecError
from permed_compute.offline import silenced
from permed_compute.sites.request import Request
from permed_compute.spec import JobSpec

SCHEMA = "KubeRay's RayJob schema (ray.io/v1 at feeaf72, 2026-08-19)"
_NAME_MOST = 47
"""KubeRay's limit on a RayJob's name, since names of services and pods are derived from it."""
_HEAD = {"cpu": "1", "memory": "4096Mi"}
"""For `permed run` and Ray's own head; no part of a job runs there."""
_HOME, _JOB = "/permed/home", "/permed/job"
_K8S_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Manifests:
    """text: YAML documents for `kubectl apply -f -`. validated: against what, '' where it could not be."""

    text: str
    validated: str


def render(spec: JobSpec, request: Request) -> Manifests:
    """The manifests of a job. Judge the request first (`check.require`). Raises `SpecError`, `SettingsError`."""
    import yaml

    documents = manifests(spec, request)
    validated = SCHEMA if find_spec("jsonschema") is not None else ""
    if validated:
        problems = list(against_schema(documents[1]))
        if problems:
            raise SpecError("RayJob", problems)
    said = f"validated against {validated}" if validated else "not validated: jsonschema is not installed"
    text = "---\n".join(yaml.dump(document, Dumper=_dumper(), sort_keys=False) for document in documents)
    return Manifests(f"# {spec.name}: {said}\n{text}", validated)


def _dumper() -> Any:
    """YAML that leaves texts of several lines as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


def manifests(spec: JobSpec, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ConfigMap, RayJob) as plain data."""
    facts = request.site.kubernetes
    if facts is None:
        raise SettingsError(
            f"Site {request.site.name} has no section `kubernetes`.", remedy="See cluster/sites/kuberay.yaml."
        )
    name = _name(spec)
    meta: dict[str, Any] = {"name": name, "namespace": facts.namespace, "labels": {"app.kubernetes.io/name": "permed"}}
    config = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta,
        "data": {"job.yaml": json.dumps(json.loads(spec.canonical()), indent=1, sort_keys=True) + "\n"},
    }  # fmt: skip
    queue = {"kueue.x-k8s.io/queue-name": facts.queue} if facts.queue else {}
    share = {"cpu": str(request.cpus), "memory": f"{request.memory}Mi"}
    if request.gpus:
        share[facts.gpu_resource] = str(request.gpus)
    worker = {
        "groupName": "workers", "replicas": spec.resources.workers.max, "minReplicas": spec.resources.workers.min,
        "maxReplicas": spec.resources.workers.max, "rayStartParams": {},
        "template": _pod(request, name, "ray-worker", share, _volumes(facts.claim, None)),
    }  # fmt: skip
    job = {
        "apiVersion": "ray.io/v1", "kind": "RayJob",
        "metadata": meta | {"labels": meta["labels"] | queue},
        "spec": {
            "entrypoint": f"permed --home {_HOME} run {_JOB}/job.yaml",
            "activeDeadlineSeconds": spec.time_limit,
            "backoffLimit": 0,  # our own budget of retries counts; a second cluster would start it anew
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": facts.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(request, name, "ray-head", _HEAD, _volumes(facts.claim, name)),
                },
                "workerGroupSpecs": [worker],
            },
        },
    }  # fmt: skip
    return config, job


def _pod(
    request: Request, name: str, container: str, share: Mapping[str, str], volumes: list[tuple[dict[str, Any], str]]
) -> dict[str, Any]:
    environment = silenced({"PERMED_RAY_ADDRESS": "127.0.0.1:6379"} if container == "ray-head" else {})
    return {
        "metadata": {"labels": {"app.kubernetes.io/name": "permed", "app.kubernetes.io/instance": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "nodeSelector": {"kubernetes.io/arch": _K8S_ARCH[request.site.machine.arch]},
            "containers": [
                {
                    "name": container,
                    "image": request.image,
                    "resources": {"requests": dict(share), "limits": dict(share)},
                    "env": [{"name": key, "value": value} for key, value in sorted(environment.items())],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": volume["name"], "mountPath": path} for volume, path in volumes],
                }
            ],
            "volumes": [volume for volume, _ in volumes],
        },
    }


def _volumes(claim: str, config: str | None) -> list[tuple[dict[str, Any], str]]:
    volumes: list[tuple[dict[str, Any], str]] = [
        ({"name": "home", "persistentVolumeClaim": {"claimName": claim}}, _HOME)
    ]
    return [*volumes, ({"name": "job", "configMap": {"name": config}}, _JOB)] if config else volumes


def _name(spec: JobSpec) -> str:
    """A DNS label from the job's name, made unique by its digest."""
    words = re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-")
    return f"permed-{words}"[: _NAME_MOST - 9].rstrip("-") + f"-{spec.digest()[:8]}"


def against_schema(job: Mapping[str, Any]) -> Iterator[Problem]:
    """What of a RayJob is not as the CRD has it: also fields it does not know, which Kubernetes would drop silently."""
    import jsonschema

    schema = _closed(json.loads(gzip.decompress(_schema_file())))
    for error in jsonschema.Draft202012Validator(schema).iter_errors(dict(job)):
        yield Problem(".".join(map(str, error.absolute_path)) or "RayJob", error.message[:300])


def _schema_file() -> bytes:
    return (resources.files("permed_compute.cluster") / "kuberay" / "rayjob-v1.json.gz").read_bytes()


def _closed(schema: Any) -> Any:
    """Objects whose fields are listed take no others; `metadata`, which the CRD leaves to Kubernetes, takes any."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    fields = schema.get("properties")
    if isinstance(fields, dict) and schema.get("type") == "object" and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return made
