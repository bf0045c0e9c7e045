"""What has come in: a receipt for each set of files in place, and the sets that jobs name (`transfer:NAME`).

A set is known by its reference, the digest of its manifest; a name is this home's own, and stands for one set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import PermissionDeniedError, StateError
from permed_compute.paths import read_json, write_json
from permed_compute.spec import DataClass, DataRef, JobSpec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_REFERENCE = re.compile(r"[0-9a-f]{16,64}")
_ORDER = tuple(DataClass)


@dataclass(frozen=True, slots=True)
class Receipt:
    """That a set is in place, every file with its digest verified: written by `receive`."""

    reference: str
    folder: str
    files: int
    bytes: int
    data_class: str
    signer: str
    """As the list of signers names them; '' = not signed."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def file(receipts: Path, reference: str) -> Path:
    """Where the receipt of that set stands."""
    return receipts / f"{reference}.json"


def receipt(receipts: Path, reference: str) -> Receipt | None:
    """The receipt of a set that is in place, or None."""
    row = read_json(file(receipts, reference))
    return Receipt(**row) if row and Path(row["folder"]).is_dir() else None


def every(receipts: Path) -> Iterator[Receipt]:
    """The receipts of all sets in place."""
    for path in sorted(receipts.glob("*.json")):
        found = receipt(receipts, path.stem)
        if found is not None:
            yield found


def named(receipts: Path, name: str) -> Receipt | None:
    """The set that was received under that name, or whose reference it is (16 characters of it will do)."""
    row = read_json(_name_file(receipts, name))
    if row is not None:
        return receipt(receipts, row["reference"])
    if not is_reference(name):
        return None
    found = [path.stem for path in receipts.glob(f"{name}*.json")]
    return receipt(receipts, found[0]) if len(found) == 1 else None


def is_reference(name: str) -> bool:
    """Whether it is a reference, or the beginning of one."""
    return _REFERENCE.fullmatch(name) is not None


def require_free(receipts: Path, name: str) -> None:
    """Raise `StateError` where a set may not be received under that name."""
    if _NAME.fullmatch(name) is None or is_reference(name):
        raise StateError(
            f"{name!r} cannot be a set's name.",
            remedy="Letters, digits, . _ -; no patient identifiers, and not like a reference.",
        )


def give_name(receipts: Path, name: str, reference: str) -> None:
    """From now on the name stands for that set. Raises `StateError` where it stands for another that is in place."""
    require_free(receipts, name)
    before = named(receipts, name)
    if before is not None and before.reference != reference:
        raise StateError(
            f"{name} is the name of another set, {before.reference[:16]}.", remedy="Give this one another name."
        )
    write_json(_name_file(receipts, name), {"reference": reference})


def missing(spec: JobSpec, receipts: Path) -> tuple[str, ...]:
    """The sets that the job names and that are not in place."""
    return tuple(name for name in spec.transfers if named(receipts, name) is None)


def references(spec: JobSpec, receipts: Path) -> tuple[tuple[str, str], ...]:
    """(name, reference) of each set that the job names and that is in place."""
    found = [(name, named(receipts, name)) for name in spec.transfers]
    return tuple((name, each.reference) for name, each in found if each is not None)


def located(spec: JobSpec, receipts: Path) -> JobSpec:
    """The job with its sets as the folders in which they stand; what is `missing` is left as it is.

    Raises `PermissionDeniedError` where a set is more sensitive than the job says that its data are.
    """
    return spec.model_copy(update={"inputs": tuple(_located(ref, spec, receipts) for ref in spec.inputs)})


def _located(ref: DataRef, spec: JobSpec, receipts: Path) -> DataRef:
    found = named(receipts, ref.transfer) if ref.transfer else None
    if found is None:
        return ref
    if _ORDER.index(DataClass(found.data_class)) > _ORDER.index(spec.data_class):
        raise PermissionDeniedError(
            f"The set {ref.transfer} is {found.data_class}; the job says that its data are {spec.data_class.value}.",
            remedy=f"Write data_class: {found.data_class} in the job, and submit it anew.",
        )
    return ref.model_copy(update={"path": str(ref.within(Path(found.folder)))})


def _name_file(receipts: Path, name: str) -> Path:
    return receipts / "names" / f"{name}.json"
