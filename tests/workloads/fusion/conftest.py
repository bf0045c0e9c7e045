from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("anndata")

from permed_compute.testing.context import Outcome  # noqa: E402

from . import made  # noqa: E402


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A simulated cohort of 90 people."""
    return made.simulated(tmp_path_factory.mktemp("simulated"), 90)


@pytest.fixture(scope="package")
def trained(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return made.run(
        "fusion/train-survival", tmp_path_factory.mktemp("trained"), files, **made.SMALL, simulated=[*made.SIMULATED]
    )
