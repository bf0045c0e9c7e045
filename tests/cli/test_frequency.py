"""From a genotype file to a released register, by commands alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """300 people in two populations × 30 variants as a VCF, and the two job files."""
    rng = np.random.default_rng(1)
    names = [f"person{k}" for k in range(300)]
    lines = ["##fileformat=VCFv4.3", "##contig=<ID=1>", '##FORMAT=<ID=GT,Number=1,Type=String,Description="G">']
    lines.append("\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *names]))
    for k in range(30):
        calls = rng.choice(["0/0", "0/1", "1/1"], 300, p=[0.6, 0.3, 0.1])
        lines.append("\t".join(["1", str(100 + k), ".", "A", "C", ".", ".", ".", "GT", *calls]))
    (tmp_path / "a.vcf").write_text("\n".join(lines) + "\n")
    rows = "".join(f"{name}\t{'AB'[k % 2]}\n" for k, name in enumerate(names))
    (tmp_path / "groups.tsv").write_text("IID\tPOPULATION\n" + rows)
    (tmp_path / "convert.yaml").write_text("name: c\nworkload: omics/convert\ninputs: [a.vcf]\ntime_limit: 5m\n")
    return tmp_path


def test_a_file_becomes_a_register(permed, study, home):
    made = permed("--json", "run", study / "convert.yaml")
    assert made.code == 0, made.err
    (results,) = home.jobs.glob("*/results")
    job = study / "release.yaml"
    job.write_text(
        "name: r\nworkload: omics/frequency\ninputs:\n"
        f"  - {{name: genotypes, path: {results}}}\n  - {{name: populations, path: groups.tsv}}\n"
        f"params: {{register: {study / 'register'}}}\ntime_limit: 5m\n"
    )
    assert permed("run", job).code == 0
    shown = permed("--json", "frequency", "show", study / "register")
    assert shown.code == 0 and [entry["people"] for entry in shown.json] == [{"A": 130, "B": 130}]
    assert permed("frequency", "verify", study / "register").code == 0
    table = study / "register" / "releases" / "0001" / "public" / "frequencies.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    broken = permed("frequency", "verify", study / "register")
    assert broken.code != 0 and "not what was released" in broken.err
    assert permed("frequency", "show", study / "nowhere").code != 0
