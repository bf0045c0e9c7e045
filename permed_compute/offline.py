"""What keeps libraries from calling out: one table of variables, laid over every process that we start.

Compute nodes of the sites have no route out, and inside TSD nothing may even try. Telemetry is off everywhere; model
hubs are not asked, since weights come by digest from the package that ships them (decision 010). A variable that the
user has set stands, except for telemetry.
"""

from __future__ import annotations

from collections.abc import Mapping

NO_TELEMETRY: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "offline",
    "VLLM_NO_USAGE_STATS": "1",
}
"""ray, mlflow; and huggingface_hub, transformers, albumentations, wandb, vllm, which own code may bring."""

NO_HUB: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
"""huggingface_hub (timm asks it for weights), transformers, datasets; pip's look for a newer pip."""


def silenced(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process that calls nobody."""
    return {**NO_HUB, **environment, **NO_TELEMETRY}
