"""Every feature that is computed, against IBSI's values for its digital phantom, within its tolerance."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from permed_compute.workloads.radiology import radiomics

# The phantom (github.com/theibsi/data_sets, ibsi_1_digital_phantom): planes along z, rows along y; 0 is outside.
PHANTOM = np.array([
    [[1, 4, 4, 1, 1], [1, 4, 6, 1, 1], [4, 1, 6, 4, 1], [4, 4, 6, 4, 1]],
    [[1, 4, 4, 1, 1], [1, 1, 6, 1, 1], [0, 1, 3, 1, 1], [4, 4, 6, 1, 1]],
    [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 6, 1, 1]],
    [[1, 4, 4, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 6, 1, 1]],
]).transpose(2, 1, 0)  # fmt: skip
SPACING = (2.0, 2.0, 2.0)

# IBSI reference manual (arXiv:1612.07003v11), tables "dig. phantom": value, tolerance; 0: to the digits that are given.
EXPECTED = {
    "morph.vol": (556, 4), "morph.approx.vol": (592, 4), "morph.area": (388, 3), "morph.av": (0.698, 0.004),
    "morph.comp.1": (0.0411, 0.0003), "morph.comp.2": (0.599, 0.004), "morph.sph.dispr": (1.19, 0.01),
    "morph.sphericity": (0.843, 0.005), "morph.asphericity": (0.186, 0.001), "morph.com": (0.672, 0.004),
    "morph.diam": (13.1, 0.1), "morph.pca.major": (11.4, 0.1), "morph.pca.minor": (9.31, 0.06),
    "morph.pca.least": (8.54, 0.05), "morph.pca.elongation": (0.816, 0.005), "morph.pca.flatness": (0.749, 0.005),
    "stat.mean": (2.15, 0), "stat.var": (3.05, 0), "stat.skew": (1.08, 0), "stat.kurt": (-0.355, 0),
    "stat.median": (1, 0), "stat.min": (1, 0), "stat.P10": (1, 0), "stat.P90": (4, 0), "stat.max": (6, 0),
    "stat.iqr": (3, 0), "stat.range": (5, 0), "stat.mad": (1.55, 0), "stat.rmad": (1.11, 0), "stat.medad": (1.15, 0),
    "stat.cov": (0.812, 0), "stat.qcod": (0.6, 0), "stat.energy": (567, 0), "stat.rms": (2.77, 0),
    "ih.entropy": (1.27, 0), "ih.uniformity": (0.512, 0),
    "cm.joint.max": (0.509, 0), "cm.joint.avg": (2.15, 0), "cm.joint.var": (3.13, 0), "cm.joint.entr": (2.57, 0),
    "cm.diff.avg": (1.38, 0), "cm.diff.var": (3.21, 0), "cm.diff.entr": (1.64, 0), "cm.sum.avg": (4.3, 0),
    "cm.sum.var": (7.41, 0), "cm.sum.entr": (2.11, 0), "cm.energy": (0.291, 0), "cm.contrast": (5.12, 0),
    "cm.dissimilarity": (1.38, 0), "cm.inv.diff": (0.688, 0), "cm.inv.diff.norm": (0.856, 0),
    "cm.inv.diff.mom": (0.631, 0), "cm.inv.diff.mom.norm": (0.902, 0), "cm.inv.var": (0.0574, 0),
    "cm.corr": (0.183, 0), "cm.auto.corr": (5.19, 0), "cm.clust.tend": (7.41, 0), "cm.clust.shade": (17.4, 0),
    "cm.clust.prom": (147, 0), "cm.info.corr.1": (-0.0288, 0), "cm.info.corr.2": (0.269, 0),
    "szm.sze": (0.255, 0), "szm.lze": (550, 0), "szm.lgze": (0.253, 0), "szm.hgze": (15.6, 0),
    "szm.szlge": (0.0256, 0), "szm.szhge": (2.76, 0), "szm.lzlge": (503, 0), "szm.lzhge": (1490, 0),
    "szm.glnu": (1.4, 0), "szm.glnu.norm": (0.28, 0), "szm.zsnu": (1, 0), "szm.zsnu.norm": (0.2, 0),
    "szm.z.perc": (0.0676, 0), "szm.gl.var": (2.64, 0), "szm.zs.var": (331, 0), "szm.zs.entr": (2.32, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    mask = PHANTOM > 0
    return radiomics.features(PHANTOM, mask, SPACING, radiomics.discretise(PHANTOM, mask, width=1.0))


def test_every_feature_has_a_reference_and_a_code() -> None:
    assert set(EXPECTED) == set(radiomics.CODES) and len(set(radiomics.CODES.values())) == len(radiomics.CODES)
    assert np.count_nonzero(PHANTOM) == 74


@pytest.mark.parametrize("tag", list(EXPECTED))
def test_the_digital_phantom_gives_the_reference_value(found: dict[str, float], tag: str) -> None:
    value, tolerance = EXPECTED[tag]
    shown = found[tag] if tolerance else float(f"{found[tag]:.3g}")
    assert abs(shown - value) <= tolerance + 1e-9, (found[tag], value)


def test_bins_by_number_give_the_phantoms_own_levels() -> None:
    mask = PHANTOM > 0
    assert np.array_equal(radiomics.discretise(PHANTOM, mask, bins=6), PHANTOM)
    assert np.array_equal(radiomics.discretise(PHANTOM * 25.0 + 100, mask, width=25.0), PHANTOM)
    shifted = radiomics.discretise(PHANTOM, mask, width=1.0, lowest=0.0)
    assert np.array_equal(shifted[mask], PHANTOM[mask] + 1)
    flat = radiomics.discretise(np.ones_like(PHANTOM), mask, bins=6)
    assert flat.max() == 1


def test_one_grey_level_and_one_voxel_are_no_error() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    image = np.full((5, 5, 5), 7.0)
    alone = radiomics.features(image, mask, SPACING, radiomics.discretise(image, mask, bins=8))
    assert alone["stat.mean"] == 7 and alone["morph.approx.vol"] == 8 and np.isnan(alone["cm.joint.avg"])
    mask[1:4] = True
    flat = radiomics.features(image, mask, SPACING, radiomics.discretise(image, mask, bins=8))
    assert flat["cm.joint.max"] == 1 and flat["cm.joint.entr"] == 0 and np.isnan(flat["cm.corr"])


def test_the_job_writes_a_table_that_omics_reads(tmp_path: Path) -> None:
    from permed_compute.spec import JobSpec
    from permed_compute.testing.context import run_map
    from permed_compute.workloads.radiology import characterise, nifti

    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    rows = []
    for number in range(3):
        label = (PHANTOM > 0).astype(np.uint8)
        label[4, :, 0] = 2 if number < 2 else 1
        nifti.write(label, affine, tmp_path / f"l{number}.nii")
        nifti.write((PHANTOM + number).astype(np.int16), affine, tmp_path / f"i{number}.nii")
        rows.append({"label": f"l{number}.nii", "image": f"i{number}.nii", "subject": f"Kari {number}"})
    index = tmp_path / "cases.json"
    index.write_text(json.dumps({"labels": {"1": "organ", "2": "left lesion"}, "cases": rows}))
    spec = JobSpec(
        name="t", workload="radiology/radiomics", inputs=[{"name": "cases", "path": str(index)}],
        params={"bin_width": 1.0},
    )  # fmt: skip
    outcome = run_map(characterise.WORKLOAD, spec, tmp_path / "w")
    written = {path.name: path.read_text().splitlines() for path in outcome.context.out.glob("*.tsv")}
    tables = {name: list(csv.DictReader(lines, delimiter="\t")) for name, lines in written.items()}
    assert set(tables) == {"radiomics-organ.tsv", "radiomics-left-lesion.tsv"}
    organ, lesion = tables["radiomics-organ.tsv"], tables["radiomics-left-lesion.tsv"]
    assert [len(organ), len(lesion)] == [3, 3] and list(organ[0])[:2] == ["IID", "case"]
    assert list(organ[0])[2:] == list(radiomics.CODES)
    assert {row["IID"] for row in organ} == {outcome.context.pseudonym(f"Kari {n}") for n in range(3)}
    assert sum(row["stat.mean"] == "NA" for row in lesion) == 1, "a structure that is not there has no features"
    about = json.loads((outcome.context.out / "radiomics.json").read_text())
    assert about["features"]["stat.mean"] == "Q4LE" and about["discretisation"] == {"bin_width": 1.0, "lowest": None}
    assert "Kari" not in json.dumps(outcome.result.values) + json.dumps(about)
    [finding] = {finding.code for done in outcome.done for finding in done.findings}
    assert finding == "STRUCTURE_ABSENT"
