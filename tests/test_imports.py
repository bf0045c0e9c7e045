"""What importing and asking for help may load: a login node's Python starts in a fraction of a second."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"ray", "torch", "mlflow", "pandas", "monai", "pydicom", "highdicom", "matplotlib", "scipy", "sqlalchemy"}


def loaded(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running `code`."""
    program = f"{code}\nimport sys\nsys.stderr.write(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import permed_compute",
        "from permed_compute.cli import main; assert main(['--help']) == 0",
        "from permed_compute.cli import main; assert main(['run', '--help']) == 0",
        "from permed_compute.cli import main; assert main(['--version']) == 0",
    ],
)
def test_light_ways_in_load_nothing_heavy(code: str) -> None:
    modules = loaded(code)
    assert "permed_compute" in modules
    assert not modules & HEAVY


def test_the_package_alone_does_not_even_load_pydantic() -> None:
    assert not loaded("import permed_compute") & {"pydantic", "typer", "rich", "yaml", "numpy"}


def test_help_loads_neither_pydantic_nor_rich() -> None:
    """They cost more than everything else that `permed --help` needs."""
    assert not loaded("from permed_compute.cli import main; main(['--help'])") & {"pydantic", "rich", "yaml", "numpy"}


def test_reading_a_job_loads_nothing_heavy() -> None:
    code = "from permed_compute.spec import loads; loads('name: x\\nworkload: m:f')"
    assert not loaded(code) & (HEAVY | {"numpy"})


def test_every_public_name_is_there() -> None:
    import permed_compute

    for name in permed_compute.__all__:
        assert getattr(permed_compute, name) is not None
    with pytest.raises(AttributeError):
        _ = permed_compute.nonsense  # type: ignore[attr-defined]
