"""Genotype stores: VCF Zarr (v3, sharded) for everybody, and `packed2` beside it for computing.

    genotypes.zarr/
      variant_contig variant_position variant_id variant_allele variant_filter sample_id contig_id filter_id
      call_genotype  call_genotype_phased  call_DS     VCF Zarr 0.4, where the store was made for interchange
      sample_sex                                       0 unknown, 1 male, 2 female
      packed2                                          (variants, ceil(samples / 4)) uint8
      dosage16                                         (variants, samples) uint16, where dosages were imputed

`packed2`: sample s stands in byte s // 4 at bits 2 (s % 4); 0, 1, 2 are copies of ALT, 3 is missing; a haploid call is
0 or 2, as PLINK has it; bits behind the last sample are 0. `dosage16` counts 1/16384 of an ALT copy, 65535 is missing.

A store is written part by part: a part holds `part_variants` rows, which is one shard of every array, so that parts are
written by different processes, in any order, and put together by hard links. Every array that has a variant axis is
laid out by part: no step reads all variants.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import NotFoundError, WorkloadError
from permed_compute.paths import write_json
from permed_compute.storage.ledger import link_tree

CHUNK = 1000
"""Variants in a chunk of `packed2`."""
MISSING_DOSAGE = 65535
DOSAGE_ONE = 16384
_PART_BYTES = 128 * 1024 * 1024
_MOST_PART_VARIANTS = 20_000
_SAMPLE_CHUNK = 10_000
_GENOTYPE_CHUNK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the shape of every array of a store."""

    samples: int
    variants: int
    interchange: bool = True
    dosage: bool = False
    part_variants: int = 0
    """Rows in a part; 0 = chosen so that a part of `packed2` is at most 128 MiB and at most 20,000 rows."""

    def __post_init__(self) -> None:
        if not self.part_variants:
            fit = _PART_BYTES // max(1, self.row_bytes) // CHUNK * CHUNK
            object.__setattr__(self, "part_variants", int(min(max(fit, CHUNK), _MOST_PART_VARIANTS)))

    @property
    def row_bytes(self) -> int:
        return -(-self.samples // 4)

    @property
    def parts(self) -> int:
        return -(-self.variants // self.part_variants)

    def rows(self, part: int) -> tuple[int, int]:
        """First row of a part, and the row behind its last."""
        start = part * self.part_variants
        return start, min(start + self.part_variants, self.variants)

    @property
    def genotype_chunk(self) -> int:
        """Rows in a chunk of `call_genotype`: 1000, or a divisor that keeps the chunk's stripe within 64 MiB."""
        stripe = min(self.samples, _SAMPLE_CHUNK) * 2
        return next(rows for rows in (1000, 500, 250, 125, 100, 50, 25) if rows * stripe <= _GENOTYPE_CHUNK_BYTES)

    def estimate(self) -> tuple[int, int]:
        """(bytes, files) that the store takes at most: sizes before compression, packed at their full 2 bits."""
        per_row = self.row_bytes + 64
        arrays = 6
        if self.interchange:
            per_row += self.samples // 2  # alleles and phase, measured below 3 bits a genotype after zstd
            arrays += 2
        if self.dosage:
            per_row += 2 * self.samples
            arrays += 2
        return per_row * self.variants + 64 * self.samples, arrays * (self.parts + 2) + 24

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Rows:
    """Consecutive rows of a store, decoded. Strings are object arrays; `contig` holds indices into the store's contigs.

    filter: (rows,) indices into the store's filters, -1 = none given. genotype: (rows, samples, 2) int8, -1 missing,
    -2 no second allele. phased: (rows, samples) bool. dosage: (rows, samples) uint16 as in `dosage16`.
    split: this row is one ALT of a record that has several.
    """

    contig: np.ndarray
    position: np.ndarray
    id: np.ndarray
    ref: np.ndarray
    alt: np.ndarray
    packed: np.ndarray
    filter: np.ndarray
    split: np.ndarray
    genotype: np.ndarray | None = None
    phased: np.ndarray | None = None
    dosage: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class Header:
    """What a store says once. `samples` are pseudonyms; `sex`: int8, 0 unknown, 1 male, 2 female."""

    samples: Sequence[str]
    sex: np.ndarray
    contigs: Sequence[str]
    filters: Sequence[str] = ("PASS",)
    build: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def _pipeline() -> AbstractContextManager[object]:
    """Arrays opened inside use zarrs' codecs where they are installed: 3 times faster on shards, the same bytes."""
    import zarr

    if find_spec("zarrs") is None:
        return nullcontext()
    pipeline: AbstractContextManager[object] = zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return pipeline


def _specs(layout: Layout) -> dict[str, tuple[tuple[int, ...], Any, tuple[int, ...], tuple[int, ...] | None, Any]]:
    """Of every array with a variant axis: shape, dtype, chunks, shards, fill."""
    v, n, part = layout.variants, layout.samples, layout.part_variants
    stripe = min(n, _SAMPLE_CHUNK)
    wide = -(-n // stripe) * stripe
    rows = layout.genotype_chunk
    table: dict[str, Any] = {
        "variant_contig": ((v,), np.int32, (part,), None, -1),
        "variant_position": ((v,), np.int32, (part,), None, -1),
        "variant_id": ((v,), str, (part,), None, ""),
        "variant_allele": ((v, 2), str, (part, 2), None, ""),
        "variant_filter": ((v,), np.int32, (part,), None, -1),
        "variant_split": ((v,), np.bool_, (part,), None, False),
        "packed2": ((v, layout.row_bytes), np.uint8, (CHUNK, layout.row_bytes), (part, layout.row_bytes), 0),
    }
    if layout.interchange:
        table["call_genotype"] = ((v, n, 2), np.int8, (rows, stripe, 2), (part, wide, 2), -1)
        table["call_genotype_phased"] = ((v, n), np.bool_, (rows, stripe), (part, wide), False)
    if layout.dosage:
        table["dosage16"] = ((v, n), np.uint16, (rows, stripe), (part, wide), MISSING_DOSAGE)
        if layout.interchange:
            table["call_DS"] = ((v, n), np.float32, (rows, stripe), (part, wide), np.nan)
    return table


_DIMENSIONS = {
    "variant_allele": ["variants", "alleles"], "packed2": ["variants", "sample_bytes"],
    "call_genotype": ["variants", "samples", "ploidy"], "call_genotype_phased": ["variants", "samples"],
    "call_DS": ["variants", "samples"], "dosage16": ["variants", "samples"],
}  # fmt: skip


def _create(root: Path, layout: Layout) -> dict[str, Any]:
    import zarr
    from zarr.codecs import ZstdCodec

    group = zarr.open_group(root, mode="a", zarr_format=3)
    made = {}
    for name, (shape, dtype, chunks, shards, fill) in _specs(layout).items():
        made[name] = group.create_array(
            name, shape=shape, dtype=dtype, chunks=chunks, shards=shards, fill_value=fill,
            compressors=[ZstdCodec(level=1)], dimension_names=_DIMENSIONS.get(name, ["variants"]),
        )  # fmt: skip
    return made


def write_part(folder: Path, layout: Layout, part: int, rows: Rows) -> None:
    """Write one part's shards below `folder`, at the places that they have in the whole store."""
    start, stop = layout.rows(part)
    if len(rows) != stop - start:
        raise WorkloadError(f"Part {part} holds {len(rows)} rows; the layout has {stop - start}.")
    with _pipeline():
        arrays = _create(folder, layout)
    at = slice(start, stop)
    arrays["variant_contig"][at] = rows.contig.astype(np.int32)
    arrays["variant_position"][at] = rows.position.astype(np.int32)
    arrays["variant_id"][at] = rows.id.astype(object)
    arrays["variant_allele"][at] = np.stack([rows.ref.astype(object), rows.alt.astype(object)], axis=1)
    arrays["variant_filter"][at] = rows.filter.astype(np.int32)
    arrays["variant_split"][at] = rows.split.astype(bool)
    arrays["packed2"][at] = rows.packed
    if layout.interchange:
        genotype, phased = rows.genotype, rows.phased
        assert genotype is not None and phased is not None
        arrays["call_genotype"][at] = genotype
        arrays["call_genotype_phased"][at] = phased
    if layout.dosage:
        assert rows.dosage is not None
        arrays["dosage16"][at] = rows.dosage
        if layout.interchange:
            arrays["call_DS"][at] = dosage_as_float(rows.dosage)


def dosage_as_float(dosage: np.ndarray) -> np.ndarray:
    """float32 copies of ALT; NaN where missing."""
    return np.where(dosage == MISSING_DOSAGE, np.float32(np.nan), dosage.astype(np.float32) / np.float32(DOSAGE_ONE))


def assemble(root: Path, layout: Layout, header: Header, parts: Sequence[Path]) -> None:
    """Make the store at `root` out of its parts' folders (in order) by hard links, and write what it says once."""
    import zarr

    if len(parts) != layout.parts:
        raise WorkloadError(f"{len(parts)} parts of {layout.parts} are there: a store is whole or not at all.")
    group = zarr.open_group(root, mode="w", zarr_format=3)
    with _pipeline():
        _create(root, layout)
    for folder in parts:
        shards = [path.relative_to(folder) for path in folder.rglob("c/*") if path.is_file()]
        shards += [path.relative_to(folder) for path in folder.rglob("c/**/*") if path.is_file()]
        link_tree(folder, root, sorted(set(shards)))
    _say_once(group, header)
    group.attrs.update(
        {"vcf_zarr_version": "0.4", "source": "permed_compute", "permed_genotypes": 1, "build": header.build,
         "layout": layout.as_dict(), **dict(header.facts)}
    )  # fmt: skip


def _say_once(group: Any, header: Header) -> None:
    texts = {
        "sample_id": (header.samples, "samples"), "contig_id": (header.contigs, "contigs"),
        "filter_id": (header.filters, "filters"),
    }  # fmt: skip
    for name, (values, dimension) in texts.items():
        array = group.create_array(
            name, shape=(len(values),), dtype=str, chunks=(max(1, len(values)),), dimension_names=[dimension]
        )
        array[:] = np.array(list(values), dtype=object)
    sex = group.create_array(
        "sample_sex", shape=header.sex.shape, dtype=np.int8, chunks=(max(1, len(header.sex)),),
        dimension_names=["samples"],
    )  # fmt: skip
    sex[:] = header.sex


def check_space(folder: Path, needed: int, files: int) -> None:
    """Raises `WorkloadError` where the file system has not the bytes or the inodes."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    inodes = os.statvfs(place).f_favail
    if needed > free:
        raise WorkloadError(
            f"The store takes up to {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free.",
            remedy="Free space, or write `params: {interchange: false}`: the packed genotypes alone take a third.",
        )
    if inodes and files > inodes:  # 0: the file system does not count them
        raise WorkloadError(f"The store takes {files} files; the file system allows {inodes} more.")


class GenotypeStore:
    """A finished store, read only. Nothing but what is asked for is read."""

    def __init__(self, root: Path) -> None:
        """Raises `NotFoundError`: nothing there, or a Zarr that is not one of our stores."""
        import zarr

        self.root = root
        try:
            with _pipeline():
                self.group = zarr.open_group(root, mode="r")
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise NotFoundError(
                f"No genotype store can be opened ({type(error).__name__}).", remedy="Make one with omics/convert."
            ) from None
        if "permed_genotypes" not in self.group.attrs:
            raise NotFoundError(
                "This Zarr is not a store that omics/convert made.", remedy="Convert it: omics/convert reads VCF Zarr."
            )
        given: Any = self.group.attrs["layout"]
        self.layout = Layout(**given)
        self._arrays: dict[str, Any] = {}

    @classmethod
    def find(cls, path: Path) -> GenotypeStore:
        """The store at `path`, or the one that a convert job left in that folder."""
        return cls(path / "genotypes.zarr" if (path / "genotypes.zarr").is_dir() else path)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            with _pipeline():
                self._arrays[name] = self.group[name]
        return self._arrays[name]

    @property
    def samples(self) -> int:
        return self.layout.samples

    @property
    def variants(self) -> int:
        return self.layout.variants

    @property
    def build(self) -> str:
        return str(self.group.attrs.get("build", ""))

    @cached_property
    def sample_id(self) -> np.ndarray:
        return np.asarray(self._array("sample_id")[:], dtype=object)

    @cached_property
    def sex(self) -> np.ndarray:
        return np.asarray(self._array("sample_sex")[:], dtype=np.int8)

    @cached_property
    def contigs(self) -> list[str]:
        return [str(name) for name in self._array("contig_id")[:]]

    def contig(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int32 indices into `contigs`."""
        return np.asarray(self._array("variant_contig")[start:stop])

    def position(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.asarray(self._array("variant_position")[start:stop])

    def id(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.asarray(self._array("variant_id")[start:stop], dtype=object)

    def alleles(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(rows, 2) object: REF, ALT."""
        return np.asarray(self._array("variant_allele")[start:stop], dtype=object)

    def split(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return np.asarray(self._array("variant_split")[start:stop])

    def packed(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, ceil(samples / 4)) uint8.

        Rows of one chunk, which is what every job reads, are decoded straight from the shard: zarr's general path costs
        half as much again.
        """
        part = start // self.layout.part_variants
        if start // CHUNK == (stop - 1) // CHUNK and self.layout.parts:
            return self._one_chunk(part, start, stop)
        return np.asarray(self._array("packed2")[start:stop])

    def _one_chunk(self, part: int, start: int, stop: int) -> np.ndarray:
        """Zarr v3 sharding_indexed: (offset, length) of each inner chunk at the shard's end, before their CRC-32C."""
        from numcodecs.zstd import Zstd

        shape = (CHUNK, self.layout.row_bytes)
        first = start // CHUNK * CHUNK
        at = slice(start - first, stop - first)
        try:
            with (self.root / "packed2" / "c" / str(part) / "0").open("rb") as file:
                chunks = self.layout.part_variants // CHUNK
                file.seek(-(16 * chunks + 4), os.SEEK_END)
                index = np.frombuffer(file.read(16 * chunks), "<u8").reshape(chunks, 2)
                offset, length = (int(x) for x in index[first // CHUNK - part * chunks])
                if offset == 2**64 - 1:
                    return np.zeros((stop - start, shape[1]), np.uint8)
                file.seek(offset)
                held = np.empty(shape, np.uint8)
                Zstd().decode(file.read(length), held)
        except FileNotFoundError:  # a shard of nothing but zeros is not written
            return np.zeros((stop - start, shape[1]), np.uint8)
        return held[at]

    def dosage(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start, samples) uint16, or None where the store holds hard calls only."""
        return np.asarray(self._array("dosage16")[start:stop]) if self.layout.dosage else None

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Row ranges of whole chunks between two rows."""
        while start < stop:
            end = min((start // CHUNK + 1) * CHUNK, stop)
            yield start, end
            start = end

    def files(self, part: int) -> list[Path]:
        """The files that hold a part's genotypes and alleles: what a part of a job depends on."""
        names = ["variant_contig", "variant_position", "variant_allele", "packed2"]
        names += ["dosage16"] if self.layout.dosage else []
        inside = {"variant_allele": f"c/{part}/0", "packed2": f"c/{part}/0", "dosage16": f"c/{part}/0"}
        paths = [self.root / name / inside.get(name, f"c/{part}") for name in names]
        return [path for path in paths if path.exists()]  # a chunk that is all fill value has no file

    def header_files(self) -> list[Path]:
        """Samples and layout."""
        return [self.root / "zarr.json", self.root / "sample_id" / "c" / "0"]


def write_layout_note(folder: Path, layout: Layout) -> None:
    """Beside a store: its size as planned, for people."""
    needed, files = layout.estimate()
    write_json(folder / "layout.json", {**layout.as_dict(), "bytes_at_most": needed, "files_at_most": files})
