"""Made genotypes: PLINK 1 files and VCF text from a matrix, stores out of them, and the jobs run in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.testing.context import Outcome, run_map
from permed_compute.workloads.registry import find


def genotypes(variants: int = 300, samples: int = 101, missing: float = 0.02, seed: int = 0) -> np.ndarray:
    """(variants, samples) int8 copies of ALT, 3 missing; frequencies from rare to common."""
    rng = np.random.default_rng(seed)
    frequency = rng.beta(0.5, 1.5, size=variants).clip(0.01, 0.99)
    copies = rng.binomial(2, frequency[:, None], size=(variants, samples)).astype(np.int8)
    copies[rng.random(copies.shape) < missing] = 3
    return copies


def people(count: int) -> list[str]:
    return [f"person{k}" for k in range(count)]


def table(variants: int, contig: str = "1") -> list[tuple[str, int, str, str, str]]:
    """(contig, position, id, ref, alt) of each row; every base pair in turn, A/T and C/G among them."""
    pairs = [("A", "C"), ("G", "A"), ("C", "T"), ("T", "G"), ("A", "T"), ("C", "G")]
    return [(contig, 1000 + 10 * k, f"rs{k}", *pairs[k % len(pairs)]) for k in range(variants)]


def write_bed(stem: Path, copies: np.ndarray, *, sex: int = 0, rows=None) -> Path:
    """`stem`.bed, .bim, .fam with A1 = ALT."""
    rows = rows or table(len(copies))
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.bim").write_text("".join(f"{c}\t{i}\t0\t{p}\t{a}\t{r}\n" for c, p, i, r, a in rows))
    Path(f"{stem}.fam").write_text("".join(f"0 {name} 0 0 {sex} -9\n" for name in people(copies.shape[1])))
    code = np.array([3, 2, 0, 1], np.uint8)[copies]
    wide = np.zeros((len(copies), -(-copies.shape[1] // 4) * 4), np.uint8)
    wide[:, : copies.shape[1]] = code
    packed = (wide.reshape(len(copies), -1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(axis=2, dtype=np.uint8)
    bed = Path(f"{stem}.bed")
    bed.write_bytes(b"\x6c\x1b\x01" + packed.tobytes())
    return bed


def write_vcf(path: Path, lines: list[str], samples: list[str], header: str = "") -> Path:
    """A VCF of these records (tabs included)."""
    contigs = dict.fromkeys(line.split("\t")[0] for line in lines)
    head = "##fileformat=VCFv4.3\n" + header + "".join(f"##contig=<ID={name}>\n" for name in contigs)
    head += '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n'
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    path.write_text(head + "\t".join(columns) + "\n" + "".join(line + "\n" for line in lines))
    return path


def job(workload: str, root: Path, inputs: list, threads: int = 2, **params: object) -> Outcome:
    spec = JobSpec(name="t", workload=workload, inputs=tuple(inputs), params=params)
    return run_map(find(spec).workload, spec, root, threads=threads)


def named(name: str, path: Path) -> dict[str, str]:
    return {"name": name, "path": str(path)}


def store_of(path: Path, root: Path, **params: object) -> tuple[GenotypeStore, Outcome]:
    outcome = job("omics/convert", root, [str(path)], **params)
    assert not outcome.failures
    return GenotypeStore.find(outcome.context.out), outcome


def codes(copies: np.ndarray) -> np.ndarray:
    return np.stack([(copies == k).sum(axis=1) for k in range(4)], axis=1)


def write_score(path: Path, rows: list[tuple], name: str = "S1", build: str = "", columns: str = "") -> Path:
    """rows: (chr, pos, effect, other, weight)."""
    head = f"#pgs_id={name}\n" + (f"#genome_build={build}\n" if build else "")
    names = columns or "chr_name\tchr_position\teffect_allele\tother_allele\teffect_weight"
    path.write_text(head + names + "\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def cells_on_disk(root: Path, rows: int, features: int, seed: int = 0, draws: int = 1000) -> Path:
    """A MuData of one modality `rna`: counts of eight kinds of cells, about half of `draws` values a cell; never whole
    in memory."""
    import pandas as pd
    from scipy import sparse

    from permed_compute.storage.matrices import Modality, Writer, assemble

    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1.5, features)
    weights = np.cumsum(base * rng.lognormal(0, 0.6, (8, features)), axis=1)
    writer = Writer(root / "X", features, "uint16", is_sparse=True, threads=2)
    for first in range(0, rows, 8192):
        count = min(8192, rows - first)
        kinds, sizes = rng.integers(0, 8, count), rng.poisson(draws * rng.lognormal(0, 0.3, count))
        columns = [
            np.searchsorted(weights[k], rng.random(n) * weights[k, -1]) for k, n in zip(kinds, sizes, strict=True)
        ]
        where = np.repeat(np.arange(count), sizes), np.concatenate(columns)
        writer.append(sparse.coo_matrix((np.ones(len(where[0]), np.int32), where), shape=(count, features)).tocsr())
    writer.close()
    obs = pd.DataFrame(index=pd.Index([f"cell{k}" for k in range(rows)], dtype=object))
    var = pd.DataFrame(index=pd.Index([f"G{k}" for k in range(features)], dtype=object))
    assemble(root / "cells.zarr", {"rna": Modality(root / "X", obs, var, {}, {}, {})})
    return root / "cells.zarr"
