"""What has come in, by name and by reference, and as the inputs of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from permed_compute.errors import PermissionDeniedError, StateError
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.transfer import receipts
from permed_compute.transfer.receipts import Receipt

FIRST, SECOND = "ab" * 32, "abab" * 8 + "cd" * 16


def placed(folder: Path, reference: str, data_class: str = "yellow") -> Receipt:
    """A set in place, and its receipt."""
    where = folder / reference[:16] / str(len(list(folder.iterdir())))
    where.mkdir(parents=True)
    made = Receipt(reference, str(where), 1, 3, data_class, "")
    write_json(receipts.file(folder, reference), made.as_dict())
    return made


def job(*inputs: str, data_class: str = "red") -> JobSpec:
    return JobSpec.model_validate({"name": "a", "workload": "x:y", "inputs": inputs, "data_class": data_class})


@pytest.mark.parametrize(
    "path", ["transfer:", "transfer:/x", "transfer:a/../b", "transfer:a//b", "transfer:a b", "transfer:a/"]
)
def test_what_names_no_set_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="names no received set"):
        job(path)


def test_a_set_is_named_by_the_home_or_by_its_reference(tmp_path: Path) -> None:
    made = placed(tmp_path, FIRST)
    receipts.give_name(tmp_path, "cohort-7", FIRST)
    assert receipts.named(tmp_path, "cohort-7") == receipts.named(tmp_path, FIRST[:20]) == made
    assert receipts.named(tmp_path, "cohort-8") is None and receipts.named(tmp_path, FIRST[:15]) is None
    placed(tmp_path, SECOND)
    assert receipts.named(tmp_path, FIRST[:16]) is None  # of two sets
    assert receipts.named(tmp_path, SECOND) is not None
    assert sorted(each.reference for each in receipts.every(tmp_path)) == sorted([FIRST, SECOND])


def test_a_name_stands_for_one_set(tmp_path: Path) -> None:
    made = placed(tmp_path, FIRST)
    placed(tmp_path, SECOND)
    receipts.give_name(tmp_path, "cohort", FIRST)
    receipts.give_name(tmp_path, "cohort", FIRST)
    with pytest.raises(StateError, match="the name of another set, abababab"):
        receipts.give_name(tmp_path, "cohort", SECOND)
    Path(made.folder).rmdir()  # until that is gone
    receipts.give_name(tmp_path, "cohort", SECOND)
    for name in ("0123456789abcdef", "../x", "names with blanks"):
        with pytest.raises(StateError, match="cannot be a set's name"):
            receipts.give_name(tmp_path, name, FIRST)


def test_a_job_gets_the_folders(tmp_path: Path) -> None:
    spec = job("transfer:cohort/scans/1.dcm", "transfer:later", "/data/other")
    assert spec.transfers == ("cohort", "later") == receipts.missing(spec, tmp_path)
    made = placed(tmp_path, FIRST)
    receipts.give_name(tmp_path, "cohort", FIRST)
    assert receipts.missing(spec, tmp_path) == ("later",)
    assert receipts.references(spec, tmp_path) == (("cohort", FIRST),)
    assert [ref.path for ref in receipts.located(spec, tmp_path).inputs] == [
        f"{made.folder}/scans/1.dcm", "transfer:later", "/data/other",
    ]  # fmt: skip
    assert receipts.located(job("transfer:cohort"), tmp_path).inputs[0].path == made.folder


def test_a_job_may_not_call_files_less_sensitive_than_they_are(tmp_path: Path) -> None:
    placed(tmp_path, FIRST, "red")
    with pytest.raises(PermissionDeniedError, match="is red; the job says that its data are yellow") as raised:
        receipts.located(job(f"transfer:{FIRST}", data_class="yellow"), tmp_path)
    assert raised.value.remedy.startswith("Write data_class: red")
    assert receipts.located(job(f"transfer:{FIRST}", data_class="black"), tmp_path)
