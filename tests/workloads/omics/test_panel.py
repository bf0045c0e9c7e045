"""Panels: 96 samples with five faults, what is computed again and what is not, and the star alleles' FHIR."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from permed_compute.errors import RefusedInput, SpecError, WorkloadError
from permed_compute.execution import records
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.omics import panel, staralleles

from .made import job, named

STAR_TABLE = (
    "gene\tdiplotype\tphenotype\tactivity_score\nCYP2D6\t*1/*4\tIntermediate metabolizer\t1.0\nTPMT\t*1/*1\t\t\n"
)
STEPS = [
    {"name": "summary", "call": "permed_compute.workloads.omics.panel:combined_output"},
    {"name": "stars", "call": "permed_compute.workloads.omics.panel:star_alleles"},
]


def combined(name: str, tmb: str = "5.5", *, msi: bool = True) -> str:
    lines = [
        "[Analysis Details]", f"Pair ID\t{name}", f"DNA Sample ID\t{name}-D", "", "[TMB]", f"Total TMB\t{tmb}", "",
        *(["[MSI]", "Usable MSI Sites\t120", "Percent Unstable MSI Sites\t2.5", ""] if msi else []),
        "[Fusions]", "Fusion\tFusion Supporting Reads", "NA\t", "", "[Small Variants]", "Gene\tChromosome",
        "TP53\tchr17", "KRAS\tchr12",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def make(root, count: int, faults: dict[int, str] | None = None):
    """A sheet of `count` samples with their folders; five kinds of fault."""
    root.mkdir(parents=True, exist_ok=True)
    rows = ["[Header]", "RunName,run1", "[TSO500_Data]", "Sample_ID,Sample_Type,Pair_ID,folder"]
    for k in range(count):
        name, fault = f"patient-{k:03d}", (faults or {}).get(k, "")
        rows.append(f"{name},DNA,{name},s{k}")
        if fault == "folder":
            continue
        folder = root / f"s{k}"
        folder.mkdir(exist_ok=True)
        text = combined("patient-999" if fault == "swap" else name, "high" if fault == "number" else "5.5",
                        msi=fault != "truncated")  # fmt: skip
        (folder / f"{name}_CombinedVariantOutput.tsv").write_text(text)
        if fault != "file":
            (folder / f"{name}.staralleles.tsv").write_text(STAR_TABLE)
    (root / "sheet.csv").write_text("\n".join(rows) + "\n[Other]\nx,y\n")
    return root / "sheet.csv"


FAULTS = {7: "folder", 20: "file", 41: "swap", 66: "number", 95: "truncated"}
CODES = ["NOT_A_NUMBER", "PANEL_FILE_ABSENT", "PANEL_FOLDER_ABSENT", "PANEL_TRUNCATED", "SAMPLE_MISMATCH"]


def summary(outcome_or_folder):
    with (outcome_or_folder / "summary.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def submitted(client, sheet):
    """The job's end, its results, and how many samples were computed."""
    spec = JobSpec(name="panel", workload="omics/panel", inputs=(named("sheet", sheet),), params={"steps": STEPS})
    [done] = client.wait([one.id for one in client.submit(spec)])
    rows, _ = records.read(client.paths(done).attempt(done.attempt).records())
    [planned] = [row for row in rows if row["kind"] == "plan"]
    return done, client.paths(done).results, planned["parts"] - planned["known"]


def test_96_samples_with_five_faults_and_what_is_computed_again(client, tmp_path):
    sheet = make(tmp_path / "run", 96, FAULTS)
    done, results, computed = submitted(client, sheet)
    assert done.state == "PARTIAL" and computed == 96
    rows = summary(results)
    faulty = [row for row in rows if row["status"] != "done"]
    assert len(rows) == 96 and len(faulty) == 5
    assert sorted(row["reason"].partition(":")[0] for row in faulty) == CODES
    for row in faulty:
        assert row["sample"][:12] in row["reason"]
    assert all(row["tmb_per_mb"] == "5.5" and row["small_variants"] == "2" for row in rows if row not in faulty)
    everything = "".join(path.read_text() for path in results.rglob("*.json")) + (results / "summary.tsv").read_text()
    assert "patient-0" not in everything  # people are pseudonyms, in reasons too

    assert submitted(client, sheet)[2] == 0
    changed = sheet.parent / "s3" / "patient-003_CombinedVariantOutput.tsv"
    changed.write_text(changed.read_text().replace("5.5", "7.5"))
    _, results, computed = submitted(client, sheet)
    assert computed == 1
    assert sorted({row["tmb_per_mb"] for row in summary(results)}) == ["", "5.5", "7.5"]


def test_commands_fill_in_places_and_their_status_decides(tmp_path):
    sheet = make(tmp_path / "run", 3)
    script = (
        "import json, sys; folder, out, name = sys.argv[1:]; k = int(name[-3:]);"
        " open(out + '/count.json', 'w').write(json.dumps({'k': k})); sys.exit([0, 65, 3][k])"
    )
    step = {"name": "count", "command": [sys.executable, "-c", script, "{folder}", "{out}", "{sample}"]}
    outcome = job("omics/panel", tmp_path / "w", [named("sheet", sheet)], steps=[step])
    assert [item.values["columns"] for item in outcome.done] == [{"k": 0}]
    kinds = sorted(type(error).__name__ for error in outcome.failures.values())
    assert kinds == ["RefusedInput", "WorkloadError"]
    assert outcome.result.values["done"] == 1


def test_a_duplicate_sample_is_named_by_pseudonym(tmp_path):
    sheet = make(tmp_path / "run", 2)
    sheet.write_text(sheet.read_text().replace("patient-001,DNA", "patient-000,DNA"))
    with pytest.raises(RefusedInput) as refused:
        job("omics/panel", tmp_path / "w", [named("sheet", sheet)])
    assert refused.value.finding.code == "DUPLICATE_SAMPLES" and "patient" not in str(refused.value)


@pytest.mark.parametrize(
    "params",
    [
        {"steps": []},
        {"steps": [{"name": "a"}]},
        {"steps": [{"name": "a", "call": "x:y"}, {"name": "a", "call": "x:y"}]},
        {"steps": [{"name": "a", "command": "rm"}]},
        {"limit": "5"},
        {"step": 1},
    ],
)
def test_wrong_params_are_named(tmp_path, params):
    with pytest.raises(SpecError):
        job("omics/panel", tmp_path / "w", [named("sheet", make(tmp_path / "run", 1))], **params)


def test_a_step_that_cannot_be_imported(tmp_path):
    outcome = job("omics/panel", tmp_path / "w", [named("sheet", make(tmp_path / "run", 1))],
                  steps=[{"name": "a", "call": "no_such_module:f"}])  # fmt: skip
    (error,) = outcome.failures.values()
    assert isinstance(error, WorkloadError) and "no_such_module:f" in str(error)


# ------------------------------------------------------------------------------------------------ star alleles


def test_star_alleles_as_fhir(tmp_path):
    outcome = job("omics/panel", tmp_path / "w", [named("sheet", make(tmp_path / "run", 1))], steps=STEPS[1:])
    (item,) = outcome.done
    assert item.values["columns"] == {"CYP2D6": "*1/*4 Intermediate metabolizer", "TPMT": "*1/*1"}
    told = read_json(item.folder / panel.FHIR)
    resources = [entry["resource"] for entry in told["entry"]]
    guide = "http://hl7.org/fhir/uv/genomics-reporting/StructureDefinition/"
    assert [one["meta"]["profile"][0].removeprefix(guide) for one in resources] == [
        "genotype", "therapeutic-implication", "genotype",
    ]  # fmt: skip
    genotype, implication, _ = resources
    assert genotype["code"]["coding"][0]["code"] == "84413-4"
    assert genotype["valueCodeableConcept"]["text"] == "CYP2D6 *1/*4"
    assert genotype["component"][0]["valueCodeableConcept"]["coding"][0]["code"] == "HGNC:2625"
    assert implication["derivedFrom"] == [{"reference": told["entry"][0]["fullUrl"]}]
    assert implication["component"][0]["valueCodeableConcept"]["coding"][0]["code"] == "LA10317-8"
    assert "patient-000" not in json.dumps(told)
    r4b = pytest.importorskip("fhir.resources.R4B.bundle", reason="fhir.resources is not installed (extra: dev)")
    assert r4b.Bundle.model_validate(told).entry[1].resource.get_resource_type() == "Observation"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("CYP2D6\t1/4\t\t", "STAR_ALLELE_UNREADABLE"),
        ("CYP2D6\t*1\t\t", "STAR_ALLELE_UNREADABLE"),
        ("CYP2D6\t*1/*4\t\tmuch", "NOT_A_NUMBER"),
        ("TPMT\t*1/*2\t\t", "DUPLICATE_GENE"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, line, code):
    (tmp_path / "t.tsv").write_text(STAR_TABLE + line + "\n")
    with pytest.raises(RefusedInput) as refused:
        staralleles.read(tmp_path / "t.tsv")
    assert refused.value.finding.code == code and refused.value.finding.numbers.get("row", 4) == 4


@pytest.mark.parametrize("diplotype", ["*1/*2", "*2x2/*41", "*36+*10/*4N", "*1.001/*7.001", "*1xN/*1"])
def test_diplotypes_as_pharmvar_writes_them(tmp_path, diplotype):
    (tmp_path / "t.tsv").write_text(f"Gene\tDiplotype\nCYP2D6\t{diplotype}\n")
    assert staralleles.read(tmp_path / "t.tsv")[0].diplotype == diplotype
