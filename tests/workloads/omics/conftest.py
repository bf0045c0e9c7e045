from __future__ import annotations

import shutil

import pytest

from .made import store_of


@pytest.fixture(scope="session")
def tiny_store(shared_data, tmp_path_factory):
    """`tiny1000G`: 3,202 people × 1,004 variants, from the VCF."""
    return store_of(shared_data / "omics" / "tiny1000G.vcf.gz", tmp_path_factory.mktemp("tiny"), build="GRCh38")[0]


@pytest.fixture(scope="session")
def plink2() -> str:
    program = shutil.which("plink2")
    if program is None:
        pytest.skip("Debian's plink2 is not installed (make real-parts)")
    return program
