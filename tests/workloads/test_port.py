from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from permed_compute.errors import WorkloadError
from permed_compute.workloads.port import as_json


def test_numbers_and_arrays_of_numpy_and_torch_are_values() -> None:
    given = {
        "dice": np.float32(0.5), "count": np.int64(3), "volumes": np.arange(3), "loss": torch.tensor(0.25),
        "nested": {"rows": [(np.bool_(True), "a"), None]},
    }  # fmt: skip
    found = as_json(given)
    assert found == {
        "dice": 0.5, "count": 3, "volumes": [0, 1, 2], "loss": 0.25, "nested": {"rows": [[True, "a"], None]},
    }  # fmt: skip
    assert [type(found[name]) for name in ("dice", "count", "loss")] == [float, int, float]


def test_what_is_no_value_is_named_by_its_type_alone() -> None:
    with pytest.raises(WorkloadError, match="PosixPath was returned") as raised:
        as_json({"file": Path("Ola Nordmann.dcm")})
    assert "Nordmann" not in str(raised.value)
