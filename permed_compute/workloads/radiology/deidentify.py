"""De-identification by DICOM PS3.15 Annex E: the Basic Application Confidentiality Profile, on whole data sets.

What happens to which attribute is the standard's table E.1-1 (2026c) as `dicom-anonymizer` maintains it. Ours is what a
table cannot say: items of sequences are treated like the data set that holds them; UIDs are keyed hashes, so that
references still meet and nobody without the key finds the way back; dates move by whole days, one number per patient
(option 113107), times of day stay; private and unknown attributes go. It fails closed: an image that may show text in
its pixels is refused, and so is everything that is not an image.

The same key gives the same pseudonyms, UIDs and shifts for ever, in every run; another key gives unrelated ones.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, NotFoundError, PermissionDeniedError, RefusedInput, WorkloadError
from permed_compute.paths import replacing
from permed_compute.workloads.radiology import read
from permed_compute.workloads.radiology.geometry import refuse

EDITION = "2026c"
PROFILE, SHIFTED_DATES, CHARACTERISTICS = "113100", "113107", "113108"
_MEANINGS = {
    PROFILE: "Basic Application Confidentiality Profile",
    SHIFTED_DATES: "Retain Longitudinal Temporal Information Modified Dates Option",
    CHARACTERISTICS: "Retain Patient Characteristics Option",
}
LONGEST_SHIFT_DAYS = 3652
"""Dates move back by 1 to so many days (ten years)."""
_KEY_BYTES = 32
_OLDEST_AGE = 89

_NEVER_ANNOTATED = frozenset({
    "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4",
    "1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.130", "1.2.840.10008.5.1.4.1.1.128.1",
})  # fmt: skip
"""CT, MR and PET images (also enhanced and legacy-converted): their scanners write no text into the pixels of primary
images, and hardly one writes BurnedInAnnotation. Secondary images of these classes are screenshots often enough."""
_IMAGE = "1.2.840.10008.5.1.4.1.1."
_DOCUMENTS = ("1.2.840.10008.5.1.4.1.1.88.", "1.2.840.10008.5.1.4.1.1.104.", "1.2.840.10008.5.1.4.1.1.9.")

_ROOT = "1.2.840.10008."
_KEPT_CHARACTERISTICS = frozenset({0x00100040, 0x00101010, 0x00101020, 0x00101030})
_BORN = 0x00100030
_MOVED = ("DA", "DT", "TM", "UI")
_PIXELS = frozenset({0x7FE00001, 0x7FE00002, 0x7FE00008, 0x7FE00009, 0x7FE00010, 0x00282000})
_DELETE, _EMPTY, _DUMMY, _UID, _REFERENCES = "X", "Z", "D", "U", "X/Z/U*"
_TEXT = frozenset({"AE", "AS", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})


@dataclass(frozen=True, slots=True)
class Deidentified:
    """A clean data set, the patient's pseudonym, and what was noticed."""

    dataset: Any = field(repr=False)
    subject: str
    findings: tuple[Finding, ...] = ()


class Deidentifier:
    """The profile under one key (at least 32 bytes, secret).

    keep_characteristics: sex, age (89 at most), height and weight stay (option 113108); SUVs need the weight.
    vouched: somebody answers for there being no text in the pixels, where the file does not say (never where it says
    that there is).
    """

    def __init__(self, key: bytes, *, keep_characteristics: bool = False, vouched: bool = False) -> None:
        if len(key) < _KEY_BYTES:
            raise WorkloadError(f"The key has {len(key)} bytes.", remedy=f"It needs at least {_KEY_BYTES}: `new_key`.")
        self._key = key
        self._keep = keep_characteristics
        self._vouched = vouched

    def uid(self, original: str) -> str:
        """The UID that stands for `original` below 2.25; those that DICOM defines (classes, syntaxes) stay."""
        if not original or original.startswith(_ROOT):
            return original
        return f"2.25.{int.from_bytes(self._hash('uid', original)[:16], 'big')}"

    def subject(self, patient: str) -> str:
        """Pseudonym: PatientID and PatientName of the clean data set."""
        return f"S{self._hash('patient', patient).hex()[:16].upper()}"

    def shift_days(self, patient: str) -> int:
        """By how many days this patient's dates move; below zero."""
        return -1 - int.from_bytes(self._hash("days", patient)[:8], "big") % LONGEST_SHIFT_DAYS

    def _hash(self, what: str, text: str) -> bytes:
        return hmac.new(self._key, f"{what}\x1f{text}".encode(), hashlib.sha256).digest()

    def apply(self, ds: Any, about: str = "") -> Deidentified:
        """A clean copy of the data set; the given one is used up. Raises `RefusedInput` about `about`:

        BURNED_IN_ANNOTATION, BURNED_IN_UNKNOWN, RECOGNISABLE_FEATURES, NOT_AN_IMAGE, NO_SUBJECT.
        """
        check_pixels(ds, about, vouched=self._vouched)
        patient = _patient_of(ds)
        if not patient:
            refuse(
                "NO_SUBJECT", "The image has neither patient identifier nor study UID, so no pseudonym.", about,
                "Fetch it again from the archive.",
            )  # fmt: skip
        known = _Identifiers.of(ds)
        _Pass(self, patient, self._keep).clean(ds)
        dropped = known.drop_from(ds)
        subject = self.subject(patient)
        self._mark(ds, subject)
        findings = []
        if dropped:
            sentence = f"{dropped} attribute(s) that the profile keeps held an identifier of this image; removed."
            findings.append(Finding("IDENTIFIER_IN_KEPT_TEXT", sentence, "corrected", about, {"attributes": dropped}))
        return Deidentified(ds, subject, tuple(findings))

    def _mark(self, ds: Any, subject: str) -> None:
        from pydicom.dataset import Dataset, FileMetaDataset

        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = ds.PatientID = subject
        ds.PatientIdentityRemoved = "YES"
        codes = [PROFILE, SHIFTED_DATES] + ([CHARACTERISTICS] if self._keep else [])
        ds.DeidentificationMethod = f"permed_compute, DICOM PS3.15 {EDITION} table E.1-1"
        ds.DeidentificationMethodCodeSequence = [_coded(code) for code in codes]
        ds.LongitudinalTemporalInformationModified = "MODIFIED"
        syntax = getattr(ds, "file_meta", Dataset()).get("TransferSyntaxUID", "1.2.840.10008.1.2")
        # Written anew: the old header names the sender's station and may carry private information.
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = (
            ds.SOPClassUID,
            ds.SOPInstanceUID,
        )
        ds.preamble = bytes(128)


def _coded(code: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", _MEANINGS[code]
    return item


def _patient_of(ds: Any) -> str:
    """Whose dates and pseudonym these are: identifier and issuer, else the study (an unnamed patient's only tie)."""
    patient = str(ds.get("PatientID") or "").strip()
    issuer = str(ds.get("IssuerOfPatientID") or "").strip()
    return f"{issuer}\x1f{patient}" if patient else str(ds.get("StudyInstanceUID") or "")


def check_pixels(ds: Any, about: str = "", *, vouched: bool = False) -> None:
    """Refuse what may show a person: text in the pixels, a face, or no image at all. Unknown counts as yes."""
    sop_class = str(ds.get("SOPClassUID") or "")
    if not sop_class.startswith(_IMAGE) or sop_class.startswith(_DOCUMENTS) or "Rows" not in ds:
        refuse(
            "NOT_AN_IMAGE", "Reports, documents, waveforms and plans hold free text; only images are de-identified.",
            about, "Leave them out.",
        )  # fmt: skip
    annotated = str(ds.get("BurnedInAnnotation") or "").strip().upper()
    if annotated == "YES":
        refuse(
            "BURNED_IN_ANNOTATION", "The image says that text is burned into its pixels.", about,
            "Remove the text first, or leave the image out.",
        )  # fmt: skip
    if str(ds.get("RecognizableVisualFeatures") or "").strip().upper() == "YES":
        refuse(
            "RECOGNISABLE_FEATURES", "The image says that a person can be recognised in it.", about,
            "De-face it first, or leave it out.",
        )  # fmt: skip
    kind = [str(value).upper() for value in _many(ds.get("ImageType"))]
    primary = sop_class in _NEVER_ANNOTATED and "SECONDARY" not in kind and "SCREEN SAVE" not in kind
    if annotated != "NO" and not primary and not vouched:
        refuse(
            "BURNED_IN_UNKNOWN", "The image does not say whether text is burned into its pixels, and images of its kind"
            " often have some.", about, "Look at it; then vouch for it (`--vouched`), or leave it out.",
        )  # fmt: skip


def require_clean(ds: Any, about: str = "") -> None:
    """Refuse a data set (a header will do) that is not de-identified by its own word and by what it holds.

    For stores whose data class asks for it. Raises `RefusedInput` NOT_DEIDENTIFIED with the number of each trespass, or
    what `check_pixels` says.
    """
    said = {str(item.get("CodeValue") or "") for item in ds.get("DeidentificationMethodCodeSequence") or ()}
    counts = {
        "unmarked": int(str(ds.get("PatientIdentityRemoved") or "").upper() != "YES" or PROFILE not in said),
        "private": 0, "identifying": 0,
    }  # fmt: skip
    kept = _KEPT_CHARACTERISTICS if CHARACTERISTICS in said else frozenset()
    for element in _elements(ds):
        action = _action(element.tag)
        if element.tag.is_private:
            counts["private"] += 1
        elif element.tag not in kept and (element.tag == _BORN or (action == _DELETE and element.VR not in _MOVED)):
            counts["identifying"] += int(not element.is_empty)
    if any(counts.values()):
        refuse(
            "NOT_DEIDENTIFIED", f"The image is not marked as de-identified ({counts['unmarked']}), or holds private"
            f" ({counts['private']}) or identifying ({counts['identifying']}) attributes.", about,
            "De-identify it first: `permed radiology deidentify`.", **counts,
        )  # fmt: skip
    check_pixels(ds, about, vouched=True)


# ------------------------------------------------------------------------------------------------ the profile


@cache
def _table() -> tuple[dict[int, str], tuple[tuple[int, int, str], ...]]:
    """(action by tag, (mask, value, action) of repeating groups) of the profile."""
    from dicomanonymizer import simpledicomanonymizer as library

    letters = {
        library.delete: _DELETE, library.delete_or_empty: _EMPTY, library.empty: _EMPTY, library.replace: _DUMMY,
        library.empty_or_replace: _DUMMY, library.delete_or_replace: _DUMMY,
        library.delete_or_empty_or_replace: _DUMMY, library.replace_UID: _UID,
        library.delete_or_empty_or_replace_UID: _REFERENCES,
    }  # fmt: skip
    exact: dict[int, str] = {}
    masked = []
    for tag, action in library.initialize_actions(f"dicomfields_{EDITION}").items():
        number = tag[0] << 16 | tag[1]
        if len(tag) == 2:
            exact[number] = letters[action]
        else:
            masked.append((tag[2] << 16 | tag[3], number, letters[action]))
    return exact, tuple(masked)


def _action(tag: int) -> str:
    exact, masked = _table()
    found = exact.get(int(tag), "")
    return found or next((letter for mask, value, letter in masked if tag & mask == value & mask), "")


@dataclass(frozen=True, slots=True)
class _Pass:
    """One walk over one data set."""

    by: Deidentifier
    patient: str
    keep_characteristics: bool

    def clean(self, ds: Any) -> None:
        """In place, items of kept sequences included."""
        for tag in list(ds.keys()):
            if tag.is_private or tag.group < 8 or not _is_known(tag):
                del ds[tag]
            elif tag not in _PIXELS:
                self._element(ds, ds[tag])

    def _element(self, ds: Any, element: Any) -> None:
        action = _action(element.tag)
        if self.keep_characteristics and element.tag in _KEPT_CHARACTERISTICS:
            _cap_age(element)
        elif element.VR == "SQ":
            self._sequence(ds, element, action)
        elif element.VR in ("UN", "OB"):
            del ds[element.tag]
        elif element.VR == "UI":
            self._uids(ds, element, action)
        elif element.VR in ("DA", "DT"):
            self._dates(ds, element, action)
        elif element.VR != "TM":
            _settle(ds, element, action)

    def _sequence(self, ds: Any, element: Any, action: str) -> None:
        # A dummy for a sequence of free content would be a guess, so it goes; references stay, with their UIDs mapped.
        if action in (_DELETE, _DUMMY):
            del ds[element.tag]
        elif action == _EMPTY:
            element.value = []
        else:
            for item in element.value:
                self.clean(item)

    def _uids(self, ds: Any, element: Any, action: str) -> None:
        if action == _DELETE:
            del ds[element.tag]
        elif not element.is_empty:
            mapped = [self.by.uid(str(value)) for value in _many(element.value)]
            element.value = mapped if len(mapped) > 1 else mapped[0]

    def _dates(self, ds: Any, element: Any, action: str) -> None:
        if element.tag.group == 0x0010:  # birth and the like: no events of the study
            _settle(ds, element, action or _EMPTY)
            return
        days = self.by.shift_days(self.patient)
        moved = [_moved(str(value), days) for value in _many(element.value)]
        element.value = moved if len(moved) > 1 else (moved or [""])[0]


def _is_known(tag: Any) -> bool:
    from pydicom.datadict import dictionary_has_tag

    # Group lengths are retired and wrong after any edit.
    return tag.element != 0 and (dictionary_has_tag(tag) or bool(_action(tag)))


def _settle(ds: Any, element: Any, action: str) -> None:
    from dicomanonymizer.simpledicomanonymizer import replace_element

    if action == _DELETE:
        del ds[element.tag]
    elif action == _EMPTY:
        element.value = None
    elif action in (_DUMMY, _UID, _REFERENCES):
        try:
            replace_element(element)
        except NotImplementedError:
            element.value = None


def _moved(text: str, days: int) -> str:
    """A DA or DT text moved by whole days; what is no date becomes ''."""
    match = re.fullmatch(r"\s*(\d{4})\.?(\d{2})\.?(\d{2})([0-9.]*)([+-]\d{4})?\s*", text)
    if match is None:
        return ""
    try:
        moved = date(int(match[1]), int(match[2]), int(match[3])) + timedelta(days=days)
    except (ValueError, OverflowError):
        return ""
    return f"{moved:%Y%m%d}{match[4]}{match[5] or ''}"


def _cap_age(element: Any) -> None:
    match = re.fullmatch(r"(\d{3})Y", str(element.value or ""))
    if element.tag == 0x00101010 and match and int(match[1]) > _OLDEST_AGE:
        element.value = f"{_OLDEST_AGE + 1:03d}Y"


def _many(value: Any) -> list[Any]:
    from pydicom.multival import MultiValue

    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]


def _elements(ds: Any) -> Iterator[Any]:
    """Every element, items of sequences included."""
    for tag in list(ds.keys()):
        if tag in _PIXELS:
            continue
        element = ds[tag]
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from _elements(item)


# ------------------------------------------------------------------------------------------------ the second look


_NUMBERS = ("PatientID", "AccessionNumber", "StudyID", "AdmissionID")
_SHORTEST_NAME, _SHORTEST_NUMBER = 3, 4


@dataclass(frozen=True, slots=True)
class _Identifiers:
    """What names this patient, the staff and the examination, gathered before cleaning: must not be found after it."""

    words: frozenset[str]
    numbers: frozenset[str]

    @classmethod
    def of(cls, ds: Any) -> _Identifiers:
        words: set[str] = set()
        numbers = {str(ds.get(name) or "").strip().casefold() for name in _NUMBERS}
        for element in _elements(ds):
            if element.VR == "PN":
                for value in _many(element.value):
                    words.update(_words(str(value)))
            elif element.VR == "UI":
                numbers.update(str(value) for value in _many(element.value) if not str(value).startswith(_ROOT))
            elif element.tag in (0x00100020, 0x00101000, _BORN):
                numbers.update(str(value).strip().casefold() for value in _many(element.value))
        return cls(
            frozenset(word for word in words if len(word) >= _SHORTEST_NAME),
            frozenset(number for number in numbers if len(number) >= _SHORTEST_NUMBER),
        )

    def drop_from(self, ds: Any) -> int:
        """Remove every text that still holds one of them; how many there were."""
        dropped = 0
        for tag in list(ds.keys()):
            if tag in _PIXELS:
                continue
            element = ds[tag]
            if element.VR == "SQ":
                dropped += sum(self.drop_from(item) for item in element.value)
            elif element.VR in _TEXT and self._speaks(element):
                del ds[tag]
                dropped += 1
        return dropped

    def _speaks(self, element: Any) -> bool:
        text = "\\".join(str(value) for value in _many(element.value)).casefold()
        if any(number in text for number in self.numbers):
            return True
        # Defined terms are capitals too: a patient called Head must not cost the body part.
        return element.VR != "CS" and bool(self.words & set(_words(text)))


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\W_\d]+", text.casefold()) if word]


# ------------------------------------------------------------------------------------------------ keys and folders


def new_key(path: Path) -> None:
    """Write a fresh key (64 hexadecimal digits, mode 0600). Raises `PermissionDeniedError` where one lies there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise PermissionDeniedError("A key lies there already; it is not overwritten.") from None
    with os.fdopen(handle, "w") as file:
        file.write(os.urandom(_KEY_BYTES).hex() + "\n")


def read_key(path: Path) -> bytes:
    """The key of a file that only its owner can read. Raises `NotFoundError`, `PermissionDeniedError`."""
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        raise NotFoundError("There is no key.", remedy="Name the file, or make one with --new-key.") from None
    except UnicodeDecodeError:
        text = ""
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionDeniedError("Others than its owner may use the key.", remedy="chmod 600 FILE")
    if not re.fullmatch(rf"(?:[0-9a-fA-F]{{2}}){{{_KEY_BYTES},}}", text):
        raise WorkloadError("The key is not 64 or more hexadecimal digits.", remedy="Make one with --new-key.")
    return bytes.fromhex(text)


@dataclass(frozen=True, slots=True)
class Cleaned:
    """One source: its digest, and the clean file's path below the target, or why there is none."""

    digest: str
    file: str = ""
    findings: tuple[Finding, ...] = ()
    already: bool = False


def deidentify(
    sources: Iterable[str], target: Path, by: Deidentifier, digest: Callable[[Path], str], threads: int = 1
) -> Iterator[Cleaned]:
    """Clean copies as `target/SUBJECT/STUDY/SERIES/INSTANCE.dcm` (all of them new names), in order of the sources.

    A bad or refused source is a row with a finding, and the others go on; what lies there already is not written again.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:
        yield from pool.map(lambda source: _cleaned(source, target, by, digest), sources)


def _cleaned(source: str, target: Path, by: Deidentifier, digest: Callable[[Path], str]) -> Cleaned:
    about = ""
    try:
        about = read.source_digest(source, digest)
        with read.open_source(source) as file:
            ds = read.read_dataset(file, pixels=True)
        if ds is None:
            finding = Finding("NOT_DICOM", "A file that is not whole DICOM was skipped.", "note", about)
            return Cleaned(about, findings=(finding,))
        done = by.apply(ds, about)
        clean = done.dataset
        name = Path(done.subject, _last(clean.StudyInstanceUID), _last(clean.SeriesInstanceUID),
                    f"{_last(clean.SOPInstanceUID)}.dcm")  # fmt: skip
        if (target / name).is_file():
            return Cleaned(about, str(name), done.findings, already=True)
        with replacing(target / name) as new:
            clean.save_as(new, enforce_file_format=True)
    except RefusedInput as error:
        return Cleaned(about, findings=(error.finding,))
    except Exception as error:  # noqa: BLE001 - damaged headers raise anything; what cannot be cleaned is left out
        sentence = f"A file could not be de-identified ({type(error).__name__}) and was left out."
        return Cleaned(about, findings=(Finding("NOT_CLEANED", sentence, "refused", about),))
    return Cleaned(about, str(name), done.findings)


def _last(uid: Any) -> str:
    """A UID of ours as a folder's name: its number in base 36, which is short enough for every file system."""
    number, digits = int(str(uid).rpartition(".")[2] or 0), ""
    while number:
        number, rest = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[rest] + digits
    return digits or "0"
