"""Files to tables of people: the same from every format; what is wrong is named by row and pseudonym."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.workloads.fusion import tables

anndata = pytest.importorskip("anndata")
h5py = pytest.importorskip("h5py")

NAMES = ["ola", "kari", "siri"]
VALUES = np.array([[1.5, -2.0], [np.nan, 0.25], [3.0, 4.0]])


def hidden(identifier: str) -> str:
    return hashlib.md5(identifier.encode()).hexdigest()


def read(path: Path, **how: str) -> dict[str, tables.Table]:
    return tables.read(path, hidden, **how)


def write_anndata(path: Path, values: np.ndarray = VALUES, names: list[str] = NAMES) -> Path:
    var = pd.DataFrame(index=["a", "b"])
    anndata.AnnData(values.copy(), obs=pd.DataFrame(index=names), var=var).write_h5ad(path)
    return path


def write_text(path: Path, rows: list[str], separator: str = "\t") -> Path:
    path.write_text("\n".join(row.replace(" ", separator) for row in rows) + "\n")
    return path


ROWS = ["IID a b", "ola 1.5 -2", "kari NA 0.25", "siri 3 4"]


@pytest.mark.parametrize("kind", ["tsv", "csv", "txt", "parquet", "h5ad", "zarr"])
def test_every_format_is_the_same_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pd.DataFrame({"IID": NAMES, "a": VALUES[:, 0], "b": VALUES[:, 1]}).to_parquet(path)
    elif kind == "h5ad":
        write_anndata(path)
    elif kind == "zarr":
        anndata.read_h5ad(write_anndata(tmp_path / "x.h5ad")).write_zarr(path)
    else:
        write_text(path, ROWS, {"tsv": "\t", "csv": ",", "txt": " "}[kind])
    [(name, found)] = read(path).items()
    assert name == "" and found.columns == ("a", "b") and found.people == tuple(map(hidden, NAMES))
    assert np.array_equal(found.values, VALUES.astype(np.float32), equal_nan=True)


def test_a_mudata_is_a_table_for_each_modality_and_its_people_are_known_by_obs(tmp_path: Path) -> None:
    path, single = tmp_path / "x.h5mu", write_anndata(tmp_path / "one.h5ad")
    with h5py.File(single) as one, h5py.File(path, "w") as file:
        for name in ("rna", "drugs"):
            one.copy(one["/"], file.require_group("mod"), name)
        one.copy("obs", file)
    assert sorted(read(path)) == ["drugs", "rna"]
    assert list(tables.frame(path).index) == NAMES


def test_of_a_score_file_the_averages_count_and_ids_that_are_pseudonyms_stay(tmp_path: Path) -> None:
    own = "p-0123456789abcdef0123"
    rows = [
        "#IID ALLELE_CT NAMED_ALLELE_DOSAGE_SUM PGS1_AVG PGS1_SUM PGS1_Z",
        f"{own} 10 4 0.5 5 1.1",
        "ola 10 4 0.1 1 -1",
    ]
    found = read(write_text(tmp_path / "x.sscore", rows))[""]
    assert found.columns == ("PGS1_AVG",) and found.people == (own, hidden("ola"))
    assert found.values[:, 0] == pytest.approx([0.5, 0.1])


def test_rows_of_one_person_are_averaged_where_that_is_asked_for(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.tsv", [*ROWS, "kari 7 1.25"])
    found = read(path, repeated="mean")[""]
    assert found.values[1] == pytest.approx([7.0, 0.75]) and len(found.people) == 3


@pytest.mark.parametrize(
    "rows, code, names",
    [
        ([*ROWS, "ola 9 9"], "DUPLICATE_PEOPLE", "ola"),
        (["IID a b", "ola 1 2", "kari high 2"], "NOT_A_NUMBER", "kari"),
        (["IID a b", "ola 1 2", "kari 1 inf"], "NOT_A_NUMBER", "kari"),
        (["IID a b", "ola NA NA"], "EMPTY_MODALITY", ""),
        (["IID a b"], "EMPTY_MODALITY", ""),
        (["name a b", "ola 1 2"], "TABLE_UNREADABLE", ""),
        (["IID a b", "NA 1 2"], "TABLE_UNREADABLE", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_row_and_pseudonym(rows: list[str], code: str, names: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput) as told:
        read(write_text(tmp_path / "x.tsv", rows))
    assert told.value.finding.code == code
    assert not names or (hidden(names)[:12] in str(told.value) and "row" in told.value.finding.numbers)
    assert not any(name in str(told.value) for name in NAMES)


def test_a_matrix_whose_people_are_not_its_rows_is_refused(tmp_path: Path) -> None:
    path = write_anndata(tmp_path / "x.h5ad")
    with h5py.File(path, "a") as file:
        del file["X"]
        file["X"] = VALUES[:2]
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(RefusedInput, match=r"MATRIX_MISMATCH.*2 × 2.*3 × 2"):
        read(path)


def test_a_matrix_of_words_and_one_with_infinities_are_refused(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 0] = np.inf
    with pytest.raises(RefusedInput, match="NOT_A_NUMBER") as told:
        read(write_anndata(tmp_path / "x.h5ad", values))
    assert hidden("kari")[:12] in str(told.value) and told.value.finding.numbers["row"] == 2
    path = write_anndata(tmp_path / "y.h5ad")
    with h5py.File(path, "a") as file:
        del file["X"]
        file.create_dataset("X", data=[["a", "b"]] * 3, dtype=h5py.string_dtype())
        file["X"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    with pytest.raises(RefusedInput, match="NOT_A_NUMBER"):
        read(path)


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_bytes(b"nothing")
    with pytest.raises(RefusedInput, match="TABLE_UNREADABLE"):
        read(tmp_path / "x.h5ad")


def test_slides_are_the_mean_of_their_tiles_and_of_a_persons_slides(files: dict[str, Path], tmp_path: Path) -> None:
    from permed_compute.workloads.pathology import features

    listed = [line.split("\t") for line in files["slides"].read_text().splitlines()[1:3]]
    paths = [files["slides"].parent / name for _, name in listed]
    found = read(write_text(tmp_path / "x.tsv", ["IID slide", *(f"ola {path}" for path in paths)]))[""]
    wanted = np.mean([features.read(path)[1].astype(float).mean(axis=0) for path in paths], axis=0)
    assert found.people == (hidden("ola"),) and found.values[0] == pytest.approx(wanted, abs=1e-6)
