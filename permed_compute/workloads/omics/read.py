"""Genotype files: VCF and BCF, PLINK 1 bed, PLINK 2 PGEN, BGEN and VCF Zarr, each as `storage.genotypes.Rows`.

Indexed by row (bed, PGEN, BGEN, VCF Zarr): `open_indexed(path)` and `rows(start, stop)`. VCF and BCF are read by
region: `VcfFile.regions` and `VcfFile.read`. What cannot be read is a `RefusedInput` with a coded finding; people are
named by pseudonym, files by digest.

    VCF_TRUNCATED VCF_UNREADABLE BED_TRUNCATED BED_SAMPLE_MAJOR PLINK_SIDE_FILE PGEN_UNREADABLE BGEN_UNSUPPORTED
    BGEN_TRUNCATED DUPLICATE_SAMPLES UNSORTED_VARIANTS WRONG_BUILD PLOIDY_UNSUPPORTED NO_SAMPLES
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.storage.genotypes import DOSAGE_ONE, MISSING_DOSAGE, Rows
from permed_compute.workloads.omics import packed as bits

_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_SEX = {"1": 1, "M": 1, "m": 1, "male": 1, "2": 2, "F": 2, "f": 2, "female": 2}
_PLINK_CONTIGS = {"23": "X", "24": "Y", "25": "X", "26": "MT", "M": "MT", "XY": "X"}

# UCSC chromInfo of hg19 and hg38: the longest a position can be.
_GRCH37 = (
    249250621, 243199373, 198022430, 191154276, 180915260, 171115067, 159138663, 146364022, 141213431, 135534747,
    135006516, 133851895, 115169878, 107349540, 102531392, 90354753, 81195210, 78077248, 59128983, 63025520, 48129895,
    51304566, 155270560, 59373566,
)  # fmt: skip
_GRCH38 = (
    248956422, 242193529, 198295559, 190214555, 181538259, 170805979, 159345973, 145138636, 138394717, 133797422,
    135086622, 133275309, 114364328, 107043718, 101991189, 90338345, 83257441, 80373285, 58617616, 64444167, 46709983,
    50818468, 156040895, 57227415,
)  # fmt: skip
_CHROMOSOMES = (*(str(n) for n in range(1, 23)), "X", "Y")
LENGTHS = {
    "GRCh37": dict(zip(_CHROMOSOMES, _GRCH37, strict=True)), "GRCh38": dict(zip(_CHROMOSOMES, _GRCH38, strict=True)),
}  # fmt: skip
BUILD_NAMES = {"hg19": "GRCh37", "b37": "GRCh37", "hg38": "GRCh38", "NCBI37": "GRCh37", "NCBI38": "GRCh38"}


def refuse(code: str, sentence: str, about: str = "", remedy: str = "", **numbers: Any) -> RefusedInput:
    return RefusedInput(Finding(code, sentence, "refused", about, numbers), remedy=remedy)


def contig_name(name: str) -> str:
    """`chr10` → `10`, `23` → `X`, `chrM` → `MT`: names as Ensembl writes them."""
    plain = name[3:] if name.lower().startswith("chr") else name
    return _PLINK_CONTIGS.get(plain, plain)


def build_of(name: str) -> str:
    """`hg38` → `GRCh38`; '' where the name says nothing."""
    for known in LENGTHS:
        if known.lower() in name.lower():
            return known
    return next((build for short, build in BUILD_NAMES.items() if short.lower() in name.lower()), "")


@dataclass(slots=True)
class Table:
    """Rows of a variant table; contigs by name."""

    contig: np.ndarray
    position: np.ndarray
    id: np.ndarray
    ref: np.ndarray
    alt: np.ndarray


class Indexed(Protocol):
    """A genotype file whose rows can be read in any order."""

    samples: list[str]
    sex: np.ndarray
    contigs: list[str]
    variants: int
    dosage: bool
    notes: list[Finding]

    def table(self, start: int, stop: int) -> Table: ...

    def rows(self, start: int, stop: int) -> Rows: ...


FORMATS: dict[str, str] = {
    ".vcf": "vcf", ".vcf.gz": "vcf", ".vcf.bgz": "vcf", ".bcf": "vcf", ".bed": "bed", ".pgen": "pgen", ".bgen": "bgen",
    ".vcz": "vcz", ".zarr": "vcz",
}  # fmt: skip


def format_of(path: Path) -> str:
    """`vcf`, `bed`, `pgen`, `bgen` or `vcz`, by the name's end. Raises `NotFoundError`."""
    for end, kind in FORMATS.items():
        if path.name.lower().endswith(end):
            return kind
    raise NotFoundError("The input's name has no ending that is known.", remedy=f"Known: {', '.join(sorted(FORMATS))}.")


def open_indexed(path: Path, *, ref_last: bool = False) -> Indexed:
    """`ref_last`: of a BGEN, that the second allele is the reference."""
    kind = format_of(path)
    if kind == "bgen":
        return Bgen(path, ref_last=ref_last)
    kinds: dict[str, Callable[[Path], Indexed]] = {"bed": Bed, "pgen": Pgen, "vcz": Vcz}
    return kinds[kind](path)


def files_of(path: Path) -> list[Path]:
    """The input's own file and those beside it that belong to it."""
    kind = format_of(path)
    stem = path.with_suffix("")
    beside = {
        "bed": [stem.with_suffix(".bim"), stem.with_suffix(".fam")] if kind == "bed" else [],
        "pgen": [_side(stem, ".pvar"), _side(stem, ".psam")] if kind == "pgen" else [],
        "bgen": [stem.with_suffix(".sample")] if stem.with_suffix(".sample").exists() else [],
        "vcf": [],
        "vcz": [],
    }[kind]
    if kind == "vcz":
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path, *beside]


def _side(stem: Path, end: str) -> Path:
    return Path(f"{stem}{end}")


def check_samples(samples: Sequence[str], pseudonym: Callable[[str], str]) -> None:
    """Raises `RefusedInput` DUPLICATE_SAMPLES or NO_SAMPLES; the first duplicate is named by its pseudonym."""
    if not samples:
        raise refuse("NO_SAMPLES", "The file has no samples: it holds sites only.")
    seen: set[str] = set()
    twice = [name for name in samples if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise refuse(
            "DUPLICATE_SAMPLES", f"{len(twice)} sample ids stand twice, first {pseudonym(twice[0])[:12]}.",
            remedy="Give every sample an id of its own.", duplicates=len(twice),
        )  # fmt: skip


def check_sorted(contig: np.ndarray, position: np.ndarray, row: int = 0) -> None:
    """Raises `RefusedInput` UNSORTED_VARIANTS: positions fall within a contig. `row` is the first one's number."""
    falls = np.flatnonzero((contig[1:] == contig[:-1]) & (position[1:] < position[:-1]))
    if len(falls):
        raise refuse(
            "UNSORTED_VARIANTS",
            f"{len(falls)} variants stand before the one in front of them, first in row {row + int(falls[0]) + 2}.",
            remedy="Sort the file: bcftools sort, or plink2 --sort-vars.", rows=len(falls),
        )  # fmt: skip


def check_build(contigs: Sequence[str], last: dict[str, int], claimed: str, header: str = "") -> None:
    """Raises `RefusedInput` WRONG_BUILD: the header says another build, or positions lie behind a chromosome's end.

    last: highest position by contig; header: the build that the file itself names, '' where it names none.
    """
    if not claimed:
        return
    if header and header != claimed:
        raise refuse(
            "WRONG_BUILD", f"The file says {header}; the job says {claimed}.", remedy="Write the file's own build."
        )
    lengths = LENGTHS.get(claimed, {})
    behind = [name for name in contigs if last.get(name, 0) > lengths.get(name, 2**31)]
    if behind:
        raise refuse(
            "WRONG_BUILD",
            f"Positions lie behind the end of {len(behind)} chromosomes of {claimed}, first {behind[0]}"
            f" ({last[behind[0]]} of {lengths[behind[0]]}).",
            remedy="Write the build that the file has, or lift it over.", chromosomes=len(behind),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- PLINK 1


class Bed:
    """PLINK 1 `.bed`, `.bim`, `.fam`: the bed mapped into memory, its bytes translated by a table of 256."""

    dosage = False

    def __init__(self, path: Path) -> None:
        stem = path.with_suffix("")
        self.samples, self.sex = _fam(_side(stem, ".fam"))
        self._bim = _bim(_side(stem, ".bim"))
        self.contigs = _names(self._bim.contig)
        self.variants = len(self._bim.position)
        self.notes: list[Finding] = []
        self._width = -(-len(self.samples) // 4)
        with path.open("rb") as file:
            magic = file.read(3)
        if magic[:2] != b"\x6c\x1b" or magic[2:] != b"\x01":
            raise refuse("BED_SAMPLE_MAJOR", "This is no variant-major bed file.", remedy="plink2 --make-bed")
        expected = 3 + self.variants * self._width
        if path.stat().st_size != expected:
            raise refuse(
                "BED_TRUNCATED",
                f"The bed file has {path.stat().st_size} bytes; {self.variants} variants of {len(self.samples)} samples"
                f" make {expected}.",
                bytes=path.stat().st_size, expected=expected,
            )  # fmt: skip
        self._bed = np.memmap(path, np.uint8, "r", 3, (self.variants, self._width))

    def table(self, start: int, stop: int) -> Table:
        return _cut(self._bim, start, stop)

    def rows(self, start: int, stop: int) -> Rows:
        packed = _FROM_BED[np.asarray(self._bed[start:stop])]
        spare = 4 * self._width - len(self.samples)
        if spare:
            packed[:, -1] &= np.uint8(0xFF >> (2 * spare))
        return _rows(self.table(start, stop), self.contigs, packed)


def _bed_table() -> np.ndarray:
    code = np.array([2, 3, 1, 0], np.uint8)  # 00 homozygous A1 (= ALT), 01 missing, 10 heterozygous, 11 homozygous A2
    byte = np.arange(256)
    pairs = [code[(byte >> shift) & 3].astype(int) << shift for shift in (0, 2, 4, 6)]
    table: np.ndarray = np.sum(pairs, axis=0).astype(np.uint8)
    return table


_FROM_BED = _bed_table()


def _text(path: Path, columns: int) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise refuse("PLINK_SIDE_FILE", f"The {path.suffix} file beside the genotypes cannot be read.") from None
    rows = [line.split() for line in lines if line.strip()]
    short = next((number for number, row in enumerate(rows, 1) if len(row) < columns), 0)
    if short:
        raise refuse("PLINK_SIDE_FILE", f"Row {short} of the {path.suffix} file has too few columns.", row=short)
    return rows


def _fam(path: Path) -> tuple[list[str], np.ndarray]:
    rows = _text(path, 5)
    return [row[1] for row in rows], np.array([_SEX.get(row[4], 0) for row in rows], np.int8)


def _bim(path: Path) -> Table:
    rows = _text(path, 6)
    columns = list(zip(*rows, strict=False)) or [()] * 6
    try:
        position = np.array([int(value) for value in columns[3]], np.int64)
    except ValueError:
        raise refuse("PLINK_SIDE_FILE", "A position in the .bim file is no number.") from None
    contig = np.array([contig_name(name) for name in columns[0]], object)
    return Table(contig, position, *(np.array(columns[k], object) for k in (1, 5, 4)))


def _names(contig: np.ndarray) -> list[str]:
    return list(dict.fromkeys(contig.tolist()))


def _cut(table: Table, start: int, stop: int) -> Table:
    return Table(
        table.contig[start:stop], table.position[start:stop], table.id[start:stop], table.ref[start:stop],
        table.alt[start:stop],
    )  # fmt: skip


def _rows(
    table: Table, contigs: Sequence[str], packed: np.ndarray, dosage: np.ndarray | None = None,
    filters: np.ndarray | None = None, split: np.ndarray | None = None,
) -> Rows:  # fmt: skip
    number = {name: k for k, name in enumerate(contigs)}
    count = len(table.position)
    return Rows(
        contig=np.array([number[name] for name in table.contig], np.int32), position=table.position, id=table.id,
        ref=table.ref, alt=table.alt, packed=packed, dosage=dosage,
        filter=np.full(count, -1, np.int32) if filters is None else filters,
        split=np.zeros(count, bool) if split is None else split,
    )  # fmt: skip


def alleles_of(packed: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """`call_genotype` (rows, samples, 2) and `call_genotype_phased` for a source that has copies only, no phase."""
    pairs = np.array([[0, 0], [0, 1], [1, 1], [-1, -1]], np.int8)
    return pairs[bits.unpack(packed, samples)], np.zeros((packed.shape[0], samples), bool)


# --------------------------------------------------------------------------------------------- PLINK 2


class Pgen:
    """PLINK 2 `.pgen`, `.pvar`, `.psam` through pgenlib. Phase is not read; variants with several ALTs are split."""

    def __init__(self, path: Path) -> None:
        try:
            import pgenlib
        except ModuleNotFoundError:
            raise NotFoundError(
                "pgenlib is not installed.", remedy="Run: pip install 'permed-compute[omics]'."
            ) from None
        stem = path.with_suffix("")
        self.samples, self.sex = _psam(_side(stem, ".psam"))
        table, several = _pvar(_side(stem, ".pvar"))
        self.notes: list[Finding] = []
        if several:
            raise refuse(
                "PGEN_UNREADABLE", f"{several} variants of the PGEN have several ALT alleles.",
                remedy="Export it as VCF (plink2 --export vcf bgz) and convert that: its records are split by ALT.",
                variants=several,
            )  # fmt: skip
        self._table = table
        try:
            self._reader = pgenlib.PgenReader(bytes(path), raw_sample_ct=len(self.samples))
            self.variants = int(self._reader.get_variant_ct())
        except RuntimeError as error:
            raise refuse("PGEN_UNREADABLE", f"The PGEN cannot be opened: {_first_line(error)}") from None
        if self.variants != len(table.position):
            raise refuse(
                "PGEN_UNREADABLE", f"The PGEN has {self.variants} variants, the .pvar {len(table.position)}.",
                pgen=self.variants, pvar=len(table.position),
            )  # fmt: skip
        self.contigs = _names(table.contig)
        self.dosage = self._has_dosage()

    def _has_dosage(self) -> bool:
        """The header does not say it: look at rows spread over the file for a copy number that is not whole."""
        buffer = np.empty(len(self.samples), np.float32)
        for row in np.unique(np.linspace(0, self.variants - 1, num=min(self.variants, 64)).astype(int)):
            self._reader.read_dosages(int(row), buffer)
            known = buffer[buffer >= 0]
            if np.any(known != np.round(known)):
                return True
        return False

    def table(self, start: int, stop: int) -> Table:
        return _cut(self._table, start, stop)

    def rows(self, start: int, stop: int) -> Rows:
        codes = np.empty((stop - start, len(self.samples)), np.int8)
        try:
            self._reader.read_range(start, stop, codes)
        except RuntimeError as error:
            raise refuse("PGEN_UNREADABLE", f"Rows {start}–{stop} cannot be read: {_first_line(error)}") from None
        dosage = None
        if self.dosage:
            copies = np.empty((stop - start, len(self.samples)), np.float32)
            self._reader.read_dosages_range(start, stop, copies)
            dosage = _dosage16(np.where(copies < 0, np.nan, copies))
        return _rows(self.table(start, stop), self.contigs, bits.pack(codes), dosage)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def _dosage16(copies: np.ndarray) -> np.ndarray:
    """float copies of ALT, NaN where missing → uint16."""
    known = np.nan_to_num(copies, nan=0.0)
    return np.where(np.isnan(copies), MISSING_DOSAGE, np.rint(known * DOSAGE_ONE)).astype(np.uint16)


def _psam(path: Path) -> tuple[list[str], np.ndarray]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("##")]
    if not lines or not lines[0].startswith("#"):
        return _fam(path)
    header = lines[0].lstrip("#").split()
    rows = [line.split() for line in lines[1:] if line.strip()]
    iid = header.index("IID")
    sex = header.index("SEX") if "SEX" in header else -1
    codes = [_SEX.get(row[sex], 0) if sex >= 0 else 0 for row in rows]
    return [row[iid] for row in rows], np.array(codes, np.int8)


def _pvar(path: Path) -> tuple[Table, int]:
    """The table, and how many variants have several ALTs."""
    rows, header = [], ["CHROM", "POS", "ID", "REF", "ALT"]
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("##"):
                continue
            if line.startswith("#"):
                header = line.lstrip("#").split()
                continue
            rows.append(line.split("\t"))
    at = {name: header.index(name) for name in ("CHROM", "POS", "ID", "REF", "ALT")}
    column = {name: [row[k].strip() for row in rows] for name, k in at.items()}
    contig = np.array([contig_name(name) for name in column["CHROM"]], object)
    position = np.array([int(value) for value in column["POS"]], np.int64)
    several = sum("," in alt for alt in column["ALT"])
    return Table(contig, position, *(np.array(column[name], object) for name in ("ID", "REF", "ALT"))), several


# --------------------------------------------------------------------------------------------- BGEN


class Bgen:
    """BGEN 1.2 and 1.3, layout 2 of its specification: 8, 16 or 32 bits, phased or not, ploidy 1 or 2, two alleles.

    Which allele is REF the format does not say: the first (UK Biobank's way), or the last with `ref_last`.
    A hard call is the nearest whole number of copies within 0.1, else missing, as plink2 has it.
    """

    dosage = True

    def __init__(self, path: Path, *, ref_last: bool = False) -> None:
        self._path, self._ref_last = path, ref_last
        self.notes: list[Finding] = []
        with path.open("rb") as file:
            (first,) = struct.unpack("<I", file.read(4))
            size, variants, samples, magic = struct.unpack("<II I 4s".replace(" ", ""), file.read(16))
            file.seek(size)  # header block begins at byte 4; its flags are its last four bytes
            (flags,) = struct.unpack("<I", file.read(4))
            self._compression, layout, named = flags & 3, (flags >> 2) & 15, flags >> 31
            if magic not in (b"bgen", b"\0\0\0\0") or layout != 2 or self._compression > 2:
                raise refuse("BGEN_UNSUPPORTED", f"Layout {layout}, compression {self._compression}: only layout 2.")
            self.variants, self._n = variants, samples
            self.samples = _bgen_samples(file, samples) if named else []
            self._index(file, first + 4)
        side = path.with_suffix(".sample")
        self.sex = np.zeros(samples, np.int8)
        if side.exists():
            names, sex = _sample_file(side)
            if self.samples and names != self.samples:
                raise refuse(
                    "WRONG_SAMPLE_ORDER", "The .sample file names other people, or in another order, than the BGEN.",
                    remedy="Use the .sample file that was made with this BGEN.",
                )  # fmt: skip
            self.samples, self.sex = names, sex
        if len(self.samples) != samples:
            raise refuse("BGEN_UNSUPPORTED", f"{len(self.samples)} sample ids for {samples} samples.")
        self.contigs = _names(self._table.contig)

    def _index(self, file: Any, offset: int) -> None:
        contig, position, name, ref, alt = [], [], [], [], []
        places = np.empty((self.variants, 2), np.int64)
        file.seek(0, 2)
        end = file.tell()
        file.seek(offset)
        try:
            for row in range(self.variants):
                _sized(file, "<H")
                rsid, chromosome = _sized(file, "<H"), _sized(file, "<H")
                at, alleles = struct.unpack("<IH", file.read(6))
                if alleles != 2:
                    raise refuse(
                        "BGEN_UNSUPPORTED",
                        f"Row {row + 1} has {alleles} alleles.",
                        remedy="Split it: bcftools norm -m-",
                    )
                ref.append(_sized(file, "<I"))
                alt.append(_sized(file, "<I"))
                (length,) = struct.unpack("<I", file.read(4))
                places[row] = file.tell(), length
                file.seek(length, 1)
                contig.append(contig_name(chromosome))
                position.append(at)
                name.append(rsid)
            if file.tell() > end:
                raise struct.error
        except struct.error:
            raise refuse(
                "BGEN_TRUNCATED", f"The BGEN ends within row {len(position) or 1} of {self.variants}.",
                rows=len(position), expected=self.variants,
            ) from None  # fmt: skip
        self._places = places
        if self._ref_last:
            ref, alt = alt, ref
        self._table = Table(
            np.array(contig, object), np.array(position, np.int64), *(np.array(x, object) for x in (name, ref, alt))
        )

    def table(self, start: int, stop: int) -> Table:
        return _cut(self._table, start, stop)

    def rows(self, start: int, stop: int) -> Rows:
        copies = np.empty((stop - start, self._n), np.float32)
        with self._path.open("rb") as file:
            for row in range(start, stop):
                file.seek(int(self._places[row, 0]))
                copies[row - start] = self._copies(file.read(int(self._places[row, 1])), row)
        if self._ref_last:
            copies = 2 - copies
        dosage = _dosage16(copies)
        near = np.rint(np.nan_to_num(copies, nan=9.0))
        with np.errstate(invalid="ignore"):
            sure = np.abs(copies - near) <= 0.1 + 1e-6
        codes = np.where(sure, near, 3).astype(np.int8)
        return _rows(self.table(start, stop), self.contigs, bits.pack(codes), dosage)

    def _copies(self, block: bytes, row: int) -> np.ndarray:
        """float32 copies of the second allele of each sample; NaN where missing."""
        if self._compression == 1:
            block = zlib.decompress(block[4:])
        elif self._compression == 2:
            from numcodecs.zstd import Zstd

            block = bytes(Zstd().decode(block[4:]))
        samples, alleles, least, most = struct.unpack("<IHBB", block[:8])
        ploidy = np.frombuffer(block, np.uint8, samples, 8)
        phased, width = block[8 + samples], block[9 + samples]
        if alleles != 2 or most > 2 or least < 1 or width not in (8, 16, 32):
            raise refuse("BGEN_UNSUPPORTED", f"Row {row + 1}: {alleles} alleles, ploidy {least}–{most}, {width} bits.")
        values = np.frombuffer(block, f"<u{width // 8}", -1, 10 + samples).astype(np.float64) / (2**width - 1)
        copies = ploidy & 63
        if least == most == 2:
            pair = values.reshape(samples, 2)
            given = 2 - pair.sum(axis=1) if phased else 2 - 2 * pair[:, 0] - pair[:, 1]
        else:
            stored = copies.astype(np.int64)  # phased: ploidy values; unphased with two alleles: ploidy values too
            begin = np.concatenate([[0], np.cumsum(stored)[:-1]])
            first = values[begin]
            second = values[np.minimum(begin + 1, len(values) - 1)]
            both = 2 - first - second if phased else 2 - 2 * first - second
            given = np.where(copies == 2, both, 2 * (1 - first))
        return np.where(ploidy & 128, np.nan, np.clip(given, 0, 2)).astype(np.float32)


def _sized(file: Any, length: str) -> str:
    (size,) = struct.unpack(length, file.read(struct.calcsize(length)))
    return str(file.read(size), "utf-8", "replace")


def _bgen_samples(file: Any, samples: int) -> list[str]:
    _, count = struct.unpack("<II", file.read(8))
    if count != samples:
        raise refuse("BGEN_UNSUPPORTED", f"{count} sample ids for {samples} samples.")
    return [_sized(file, "<H") for _ in range(samples)]


def _sample_file(path: Path) -> tuple[list[str], np.ndarray]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    header, rows = lines[0], lines[2:]
    sex = header.index("sex") if "sex" in header else -1
    codes = [_SEX.get(row[sex], 0) if sex >= 0 else 0 for row in rows]
    return [row[1] for row in rows], np.array(codes, np.int8)


# --------------------------------------------------------------------------------------------- VCF Zarr


class Vcz:
    """VCF Zarr 0.4 and bio2zarr's 0.5, Zarr v2 or v3. A record with several ALTs becomes a row for each."""

    def __init__(self, path: Path) -> None:
        import zarr

        self._group = zarr.open_group(path, mode="r")
        if "call_genotype" not in self._group:
            raise refuse("VCF_UNREADABLE", "The Zarr has no call_genotype.", remedy="It must be VCF Zarr.")
        group: Any = self._group
        self.samples = [str(name) for name in group["sample_id"][:]]
        self.sex = np.asarray(group["sample_sex"][:], np.int8) if "sample_sex" in group else np.zeros(0, np.int8)
        if len(self.sex) != len(self.samples):
            self.sex = np.zeros(len(self.samples), np.int8)
        self.contigs = [contig_name(str(name)) for name in group["contig_id"][:]]
        alleles = np.asarray(group["variant_allele"][:], object)
        several = np.array([sum(bool(a) and a != "." for a in row[1:]) for row in alleles])
        number = np.repeat(np.arange(len(alleles)), np.maximum(several, 1))
        first = np.concatenate([[0], np.cumsum(np.maximum(several, 1))[:-1]])
        self._record = number
        self._alt = np.arange(len(number)) - first[number] + 1
        self._split = several[number] > 1
        self._alleles = alleles
        self.variants = len(number)
        self.dosage = False
        self.notes = [split_note(int((several > 1).sum()))] if np.any(several > 1) else []

    def table(self, start: int, stop: int) -> Table:
        group: Any = self._group
        record, alt = self._record[start:stop], self._alt[start:stop]
        low, high = int(record[0]), int(record[-1]) + 1
        names = np.array(self.contigs, object)[np.asarray(group["variant_contig"][low:high])]
        chosen = self._alleles[record]
        second = chosen[np.arange(len(record)), alt] if chosen.shape[1] > 1 else np.full(len(record), ".", object)
        return Table(
            names[record - low], np.asarray(group["variant_position"][low:high])[record - low],
            np.asarray(group["variant_id"][low:high], object)[record - low], chosen[:, 0], second,
        )  # fmt: skip

    def rows(self, start: int, stop: int) -> Rows:
        group: Any = self._group
        record, alt = self._record[start:stop], self._alt[start:stop]
        low, high = int(record[0]), int(record[-1]) + 1
        genotype = np.asarray(group["call_genotype"][low:high])[record - low]
        phased = np.asarray(group["call_genotype_phased"][low:high]) if "call_genotype_phased" in group else None
        if genotype.shape[2] == 1:
            genotype = np.concatenate([genotype, np.full_like(genotype, -2)], axis=2)
        made = _rows(
            self.table(start, stop), self.contigs, bits.pack_alleles(genotype, alt), split=self._split[start:stop]
        )
        made.genotype = as_biallelic(genotype, alt)
        made.phased = phased[record - low] if phased is not None else np.zeros(genotype.shape[:2], bool)
        return made


def split_note(records: int) -> Finding:
    return Finding(
        "MULTIALLELIC_SPLIT", f"{records} records have several ALT alleles; each ALT became a row of its own.",
        "corrected", numbers={"records": records},
    )  # fmt: skip


def as_biallelic(genotype: np.ndarray, alt: np.ndarray) -> np.ndarray:
    """Allele numbers of one ALT: that ALT becomes 1, every other allele 0 (as `bcftools norm -m-` has it)."""
    wanted = alt.astype(np.int8)[:, None, None]
    return np.where(genotype < 0, genotype, (genotype == wanted).astype(np.int8)).astype(np.int8)


# --------------------------------------------------------------------------------------------- VCF and BCF


@dataclass(frozen=True, slots=True)
class VcfHeader:
    samples: list[str]
    contigs: list[str]
    filters: list[str]
    build: str
    dosage: bool


class VcfFile:
    """VCF or BCF by htslib (cyvcf2), cut into regions by its index as bio2zarr cuts it."""

    def __init__(self, path: Path) -> None:
        """Raises `RefusedInput` VCF_TRUNCATED, VCF_UNREADABLE; `NotFoundError` where bio2zarr is not installed."""
        self.path = path
        self._check_end()
        with self._open() as vcf:
            raw = vcf.raw_header
            self.header = VcfHeader(
                list(vcf.samples), _contigs(vcf), _filters(raw), _vcf_build(raw), 'ID=DS,' in raw
            )  # fmt: skip

    def _open(self) -> Any:
        try:
            import cyvcf2
        except ModuleNotFoundError:
            raise NotFoundError(
                "cyvcf2 is not installed.", remedy="Run: pip install 'permed-compute[omics]'."
            ) from None
        from contextlib import closing

        try:
            return closing(cyvcf2.VCF(str(self.path), strict_gt=True))
        except Exception as error:  # noqa: BLE001 - cyvcf2 raises bare exceptions for every kind of bad file
            raise refuse("VCF_UNREADABLE", f"The VCF cannot be opened: {type(error).__name__}.") from None

    def _check_end(self) -> None:
        with self.path.open("rb") as file:
            start = file.read(18)
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - 28))
            end = file.read()
        if start[:2] == b"\x1f\x8b":
            blocked = start[12:14] == b"BC"
            if blocked and end != _BGZF_END:
                raise self._truncated("its last block is missing")
            if not blocked:
                self._check_gzip()
        elif start.startswith(b"##") and not end.endswith(b"\n"):
            raise self._truncated("its last line does not end")

    def _check_gzip(self) -> None:
        try:
            with gzip.open(self.path) as file:
                while file.read(1 << 20):
                    pass
        except (EOFError, OSError, zlib.error):
            raise self._truncated("its gzip stream breaks off") from None

    def _truncated(self, why: str) -> RefusedInput:
        return refuse(
            "VCF_TRUNCATED", f"The file was cut off: {why}.", remedy="Copy it again.", bytes=self.path.stat().st_size
        )

    def regions(self, target: int) -> list[str]:
        """About `target` regions, each to be read by itself; [''] = the whole file, where there is no index."""
        index = next(
            (Path(f"{self.path}{end}") for end in (".tbi", ".csi") if Path(f"{self.path}{end}").exists()), None
        )
        if index is None or target <= 1:
            return [""]
        from bio2zarr.vcf_utils import VcfFile as Partitioned

        with Partitioned(str(self.path)) as file:
            return [str(region) for region in file.partition_into_regions(num_parts=target)]

    def read(
        self, region: str, rows: int
    ) -> Iterator[tuple[Table, np.ndarray, np.ndarray, np.ndarray, Any, np.ndarray]]:
        """Batches of at most `rows` records: (table by contig name, first ALT's rows …). See `_Batch.take`."""
        begin = int(match[1]) if (match := re.search(r":(\d+)", region)) else 0
        batch = _Batch(self.header)
        seen = 0
        with self._open() as vcf:
            records = iter(vcf(region) if region else vcf)
            while True:
                try:
                    record = next(records, None)
                except Exception as error:  # noqa: BLE001 - as above: htslib's word on a bad line
                    raise refuse(
                        "VCF_UNREADABLE", f"Record {seen + 1} of a region cannot be read: {type(error).__name__}.",
                        record=seen + 1,
                    ) from None  # fmt: skip
                if record is None:
                    break
                seen += 1
                if begin > record.POS:
                    continue  # it reaches into the region from the one before, which has it
                batch.add(record)
                if len(batch) >= rows:
                    yield batch.take()
        if len(batch):
            yield batch.take()


class _Batch:
    """Records on their way from htslib to arrays. A record with several ALTs gives a row for each."""

    def __init__(self, header: VcfHeader) -> None:
        self._header = header
        self._clear()

    def _clear(self) -> None:
        self._rows: list[tuple[str, int, str, str, str, str, int, bool]] = []
        self._genotype: list[np.ndarray] = []
        self._phased: list[np.ndarray] = []
        self._dosage: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Any) -> None:
        called = record.genotype
        if called is None:
            raise refuse("VCF_UNREADABLE", f"Record {len(self._rows) + 1} of a batch has no GT.")
        calls = called.array()
        ploidy = calls.shape[1] - 1
        if ploidy > 2 or ploidy < 1:
            raise refuse("PLOIDY_UNSUPPORTED", f"A record has {ploidy} alleles a sample.", ploidy=ploidy)
        alleles = calls[:, :2].astype(np.int8)
        if ploidy == 1:
            alleles[:, 1] = -2
        alts = record.ALT or ["."]
        doses = record.format("DS") if self._header.dosage else None
        for k, alt in enumerate(alts):
            names = (contig_name(record.CHROM), record.POS, record.ID or ".", record.REF, alt, record.FILTER or "PASS")
            self._rows.append((*names, k + 1, len(alts) > 1))
            self._genotype.append(alleles)
            self._phased.append(calls[:, -1].astype(bool))
            if self._header.dosage:
                self._dosage.append(
                    doses[:, min(k, doses.shape[1] - 1)] if doses is not None else _no_dosage(alleles, k)
                )

    def take(self) -> tuple[Table, np.ndarray, np.ndarray, np.ndarray, Any, np.ndarray]:
        """(table, filter names, genotype as 0/1 of the row's ALT, phased, dosage16 or None, (rows, 2) [alt, split])."""
        contig, position, name, ref, alt, filters, number, split = zip(*self._rows, strict=True)
        raw = np.stack(self._genotype)
        which = np.array([number, split], np.int8).T
        genotype = as_biallelic(raw, which[:, 0])
        dosage = _dosage16(np.stack(self._dosage).astype(np.float32)) if self._dosage else None
        table = Table(
            np.array(contig, object), np.array(position, np.int64), *(np.array(x, object) for x in (name, ref, alt))
        )
        result = (table, np.array(filters, object), genotype, np.stack(self._phased), dosage, which)
        self._clear()
        return result


def _no_dosage(alleles: np.ndarray, k: int) -> np.ndarray:
    """A record without DS in a file that has it: copies out of the calls."""
    copies = (alleles == k + 1).sum(axis=1).astype(np.float32)
    return np.where((alleles == -1).any(axis=1), np.nan, np.where(alleles[:, 1] == -2, 2 * copies, copies))


def _contigs(vcf: Any) -> list[str]:
    try:
        return [contig_name(name) for name in vcf.seqnames]
    except AttributeError:  # neither ##contig lines nor an index
        return []


def _filters(header: str) -> list[str]:
    named = re.findall(r"^##FILTER=<ID=([^,>]+)", header, re.MULTILINE)
    return list(dict.fromkeys(["PASS", *named]))


def _vcf_build(header: str) -> str:
    lengths = dict(re.findall(r"^##contig=<ID=([^,>]+),length=(\d+)", header, re.MULTILINE))
    for build, known in LENGTHS.items():
        if any(known.get(contig_name(name)) == int(length) for name, length in lengths.items()):
            return build
    named = re.search(r"^##(?:reference|contig=.*assembly)=?(.*)$", header, re.MULTILINE)
    return build_of(named[1]) if named else ""
