"""Genotype files → one store (`storage.genotypes`): a part for every block of variants, put together by hard links.

`params` of the job:
    build         ''      GRCh37 or GRCh38: what the positions mean; checked where the file says it or shows it
    interchange   true    write VCF Zarr's call_genotype too; false keeps the packed genotypes (and dosages) only
    part_variants 0       rows in a part; 0 = by the number of samples
    regions       0       VCF: how many regions are read beside each other; 0 = one for every 64 MiB
    bgen_ref      first   BGEN: which allele is the reference, first or last; the format does not say

Bed, PGEN, BGEN and VCF Zarr are read by row: one round. A VCF is read by region in a first round, because only then is
it known how many rows it has; the second round writes the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, SpecError, WorkloadError
from permed_compute.paths import read_json, write_json
from permed_compute.spec import JobSpec
from permed_compute.storage import genotypes as store
from permed_compute.storage.genotypes import Header, Layout, Rows
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics import read
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result

VERSION = "1"
STORE = "genotypes.zarr"
_REGION_BYTES = 64 * 1024 * 1024
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Params:
    build: str = ""
    interchange: bool = True
    part_variants: int = 0
    regions: int = 0
    bgen_ref: str = "first"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        checked = Checked("omics/convert", given, cls)
        checked.one_of("build", "", *read.LENGTHS)
        checked.one_of("bgen_ref", "first", "last")
        if given.get("part_variants", 0) % store.CHUNK:
            checked.problem("part_variants", f"is no multiple of {store.CHUNK}.")
        return checked.done()


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    params = Params.of(spec.params)
    path = _input(spec)
    if state:
        return _shard_parts(state, params)
    kind = read.format_of(path)
    files = read.files_of(path)
    digests = tuple(ctx.digest(file) for file in files)
    if kind == "vcf":
        return _region_parts(path, digests, params, ctx)
    with ctx.stage("index"):
        source = read.open_indexed(path, ref_last=params.bgen_ref == "last")
    read.check_samples(source.samples, ctx.pseudonym)
    table = source.table(0, source.variants)
    _check_rows(table, source.contigs, params.build)
    for note in source.notes:
        ctx.finding(note)
    layout = Layout(len(source.samples), source.variants, params.interchange, source.dosage, params.part_variants)
    _announce(layout, ctx)
    header = _header_of(source.samples, source.sex, source.contigs, [], params.build, kind, ctx)
    write_json(ctx.out / "header.json", header)
    return [
        Part(
            f"rows-{part:05d}",
            digests,
            {"layout": layout.as_dict(), "part": part, "bgen_ref": params.bgen_ref},
            (str(path),),
        )
        for part in range(layout.parts)
    ]


def _input(spec: JobSpec) -> Path:
    if len(spec.inputs) != 1:
        remedy = "Give one genotype file: its other files lie beside it."
        raise SpecError("job", [Problem("inputs", f"{len(spec.inputs)} inputs.", remedy=remedy)])
    path = Path(spec.inputs[0].path)
    if not path.exists():
        raise WorkloadError("The genotype file is not there.", remedy="Look at `inputs:`.")
    return path


def _check_rows(table: read.Table, contigs: Sequence[str], build: str) -> None:
    read.check_sorted(table.contig, table.position)
    last = {name: int(table.position[table.contig == name].max()) for name in contigs if np.any(table.contig == name)}
    read.check_build(contigs, last, build)


def _announce(layout: Layout, ctx: Context) -> None:
    needed, files = layout.estimate()
    store.check_space(ctx.out, needed, files)
    ctx.log(
        f"{layout.samples} samples, {layout.variants} variants: at most {needed / 2**20:.0f} MiB in {files} files,"
        f" {layout.parts} parts"
    )


def _header_of(
    samples: Sequence[str], sex: np.ndarray, contigs: Sequence[str], filters: Sequence[str], build: str, kind: str,
    ctx: Context,
) -> dict[str, Any]:  # fmt: skip
    """People by pseudonym: the identifiers of the file stay in the file."""
    return {
        "samples": [ctx.pseudonym(name) for name in samples], "sex": sex.tolist(), "contigs": list(contigs),
        "filters": list(filters) or ["PASS"], "build": build, "facts": {"made_from": kind},
    }  # fmt: skip


def _region_parts(path: Path, digests: tuple[str, ...], params: Params, ctx: Context) -> list[Part]:
    file = read.VcfFile(path)
    read.check_samples(file.header.samples, ctx.pseudonym)
    read.check_build([], {}, params.build, file.header.build)
    wanted = params.regions or max(1, round(path.stat().st_size / _REGION_BYTES))
    regions = file.regions(wanted)
    if regions == [""] and wanted > 1:
        ctx.finding(
            Finding(
                "VCF_WITHOUT_INDEX", "The VCF has no index: it is read by one worker.", "note", numbers={"parts": 1}
            )
        )
    return [
        Part(f"region-{number:05d}", digests, {"region": region, "read": _BATCH}, (str(path),))
        for number, region in enumerate(regions)
    ]


def _shard_parts(state: Mapping[str, Any], params: Params) -> list[Part]:
    layout = Layout(**state["layout"])
    edges = np.concatenate([[0], np.cumsum(state["rows"])])
    parts = []
    for part in range(layout.parts):
        start, stop = layout.rows(part)
        inside = [k for k in range(len(edges) - 1) if edges[k] < stop and edges[k + 1] > start]
        cuts = [[max(start, edges[k]) - edges[k], min(stop, edges[k + 1]) - edges[k]] for k in inside]
        given = {
            "layout": layout.as_dict(), "part": part, "cuts": [[int(a), int(b)] for a, b in cuts],
            "contigs": state["contigs"], "filters": state["filters"], "regions": inside,
        }  # fmt: skip
        sources = tuple(state["folders"][k] for k in inside)
        parts.append(Part(f"rows-{part:05d}", tuple(state["inputs"]), given, sources))
    return parts


# ------------------------------------------------------------------------------------------------ run


def run(part: Part, model: None, ctx: Context) -> PartResult:
    """A region of a VCF as raw rows, or one part of the store."""
    if "region" in part.params:
        return _read_region(part, ctx)
    layout = Layout(**part.params["layout"])
    number = int(part.params["part"])
    start, stop = layout.rows(number)
    with ctx.stage("read"):
        rows = _from_regions(part, layout) if "cuts" in part.params else _from_index(part, start, stop)
    if layout.interchange and rows.genotype is None:
        rows.genotype, rows.phased = read.alleles_of(rows.packed, layout.samples)
    with ctx.stage("write"):
        store.write_part(ctx.out, layout, number, rows)
    called = bits.counts(rows.packed, layout.samples)
    return PartResult({"rows": len(rows), "missing": int(called[:, 3].sum()), "split": int(rows.split.sum())})


_opened: dict[tuple[str, float, str], read.Indexed] = {}


def _from_index(part: Part, start: int, stop: int) -> Rows:
    path = Path(part.sources[0])
    key = (str(path), path.stat().st_mtime, str(part.params["bgen_ref"]))
    if key not in _opened:
        _opened.clear()  # a worker has one source at a time; its index is worth keeping between parts
        _opened[key] = read.open_indexed(path, ref_last=part.params["bgen_ref"] == "last")
    return _opened[key].rows(start, stop)


_RAW = {"packed": np.uint8, "genotype": np.int8, "phased": np.bool_, "dosage": np.uint16}


def _read_region(part: Part, ctx: Context) -> PartResult:
    """Raw rows of a region: a Zarr of batches, and the variant table as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zarr
    from zarr.codecs import ZstdCodec

    file = read.VcfFile(Path(part.sources[0]))
    samples = len(file.header.samples)
    group = zarr.open_group(ctx.out / "raw.zarr", mode="w", zarr_format=3)
    shapes = {"packed": (-(-samples // 4),), "genotype": (samples, 2), "phased": (samples,)}
    if file.header.dosage:
        shapes["dosage"] = (samples,)
    batch = int(part.params["read"])
    rows_at_once = max(1, min(batch, store.CHUNK * 10_000 // max(1, samples)))
    arrays = {
        name: group.create_array(
            name, shape=(0, *shape), dtype=_RAW[name], chunks=(rows_at_once, *shape), compressors=[ZstdCodec(level=1)]
        )
        for name, shape in shapes.items()
    }
    tables, haploid, records, position, contig = [], np.zeros(samples, bool), 0, -1, ""
    with ctx.stage("read"):
        for table, filters, genotype, phased, dosage, which in file.read(str(part.params["region"]), rows_at_once):
            _in_order(table, contig, position, records)
            contig, position = str(table.contig[-1]), int(table.position[-1])
            records += len(table.position)
            # `genotype` counts the row's own ALT as allele 1 already
            values = {
                "packed": bits.pack_alleles(genotype, np.ones(len(genotype))), "genotype": genotype, "phased": phased,
                "dosage": dosage,
            }  # fmt: skip
            for name, array in arrays.items():
                array.append(values[name])
            on_x = table.contig == "X"
            haploid |= (genotype[on_x, :, 1] == -2).any(axis=0)
            columns = {name: getattr(table, name).tolist() for name in ("contig", "position", "id", "ref", "alt")}
            columns |= {"filter": filters.tolist(), "split": which[:, 1].astype(bool).tolist()}
            tables.append(pa.table(columns))
    if tables:
        pq.write_table(pa.concat_tables(tables), ctx.out / "variants.parquet")
    joined = pa.concat_tables(tables) if tables else None
    facts = {
        "contigs": list(dict.fromkeys(joined["contig"].to_pylist())) if joined is not None else [],
        "filters": sorted(set(joined["filter"].to_pylist())) if joined is not None else [],
        "haploid_on_x": np.flatnonzero(haploid).tolist(),
        "last": {},
    }
    if joined is not None:
        names = np.array(joined["contig"].to_pylist(), object)
        at = np.array(joined["position"].to_pylist())
        facts["last"] = {name: int(at[names == name].max()) for name in facts["contigs"]}
    write_json(ctx.out / "facts.json", facts)
    split = sum(int(np.sum(table["split"].to_pylist())) for table in tables)
    return PartResult({"rows": records, "split": split})


def _in_order(table: read.Table, contig: str, position: int, row: int) -> None:
    names = np.concatenate([[contig], table.contig]) if position >= 0 else table.contig
    places = np.concatenate([[position], table.position]) if position >= 0 else table.position
    read.check_sorted(names, places, row - (position >= 0))


def _from_regions(part: Part, layout: Layout) -> Rows:
    import pyarrow.parquet as pq
    import zarr

    contigs = {name: k for k, name in enumerate(part.params["contigs"])}
    filters = {name: k for k, name in enumerate(part.params["filters"])}
    pieces: list[Rows] = []
    for folder, (first, last) in zip(part.sources, part.params["cuts"], strict=True):
        group: Any = zarr.open_group(Path(folder) / "raw.zarr", mode="r")
        table = pq.read_table(Path(folder) / "variants.parquet").slice(first, last - first).to_pydict()
        text = {name: np.array(table[name], object) for name in ("id", "ref", "alt")}
        pieces.append(
            Rows(
                contig=np.array([contigs[name] for name in table["contig"]], np.int32),
                position=np.array(table["position"], np.int64), **text,
                packed=group["packed"][first:last], filter=np.array([filters[f] for f in table["filter"]], np.int32),
                split=np.array(table["split"], bool),
                genotype=group["genotype"][first:last] if layout.interchange else None,
                phased=group["phased"][first:last] if layout.interchange else None,
                dosage=group["dosage"][first:last] if layout.dosage else None,
            )
        )  # fmt: skip
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _joined(pieces: Sequence[Rows]) -> Rows:
    def both(name: str) -> Any:
        values = [getattr(piece, name) for piece in pieces]
        return None if values[0] is None else np.concatenate(values)

    return Rows(**{name: both(name) for name in Rows.__slots__})


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    params = Params.of(ctx.spec.params)
    if results and "region" in results[0].part.params:
        return _second_round(results, params, ctx)
    done = sorted(results, key=lambda item: int(item.part.params["part"]))
    layout = Layout(**done[0].part.params["layout"])
    if len(done) != layout.parts:
        raise WorkloadError(
            f"{layout.parts - len(done)} of {layout.parts} parts are missing: half a store is none.",
            remedy="`permed results JOB` says why they failed; resume the job when that is mended.",
        )
    said: Any = state.get("header") or read_json(ctx.out / "header.json")
    header = Header(
        said["samples"], np.array(said["sex"], np.int8), said["contigs"], said["filters"], said["build"], said["facts"]
    )
    with ctx.stage("assemble"):
        store.assemble(ctx.out / STORE, layout, header, [item.folder for item in done])
    (ctx.out / "header.json").unlink(missing_ok=True)
    store.write_layout_note(ctx.out, layout)
    _note_duplicates(store.GenotypeStore(ctx.out / STORE), ctx)
    size = sum(path.stat().st_size for path in (ctx.out / STORE).rglob("*") if path.is_file())
    files = sum(1 for path in (ctx.out / STORE).rglob("*") if path.is_file())
    missing = sum(int(item.values["missing"]) for item in done)
    calls = layout.samples * layout.variants
    values = {
        "samples": layout.samples, "variants": layout.variants, "call_rate": 1 - missing / max(1, calls),
        "bytes": size, "files": files, "build": header.build, "store": STORE,
        "rows_from_records_with_several_alts": sum(int(item.values["split"]) for item in done),
    }  # fmt: skip
    return Result(values=values, metrics={"variants": float(layout.variants), "samples": float(layout.samples)})


def _second_round(results: Sequence[DonePart], params: Params, ctx: Context) -> Next:
    done = sorted(results, key=lambda item: item.part.name)
    facts: list[Any] = [read_json(item.folder / "facts.json") for item in done]
    path = _input(ctx.spec)
    file = read.VcfFile(path).header
    expected = len(list(plan(ctx.spec, {}, ctx)))
    if len(done) != expected:
        raise WorkloadError(f"{expected - len(done)} of {expected} regions could not be read: half a store is none.")
    seen = list(dict.fromkeys(name for fact in facts for name in fact["contigs"]))
    filters = list(dict.fromkeys([*file.filters, *(name for fact in facts for name in fact["filters"])]))
    last: dict[str, int] = {}
    for fact in facts:
        for name, position in fact["last"].items():
            last[name] = max(last.get(name, 0), position)
    read.check_build(seen, last, params.build)
    rows = [int(item.values["rows"]) for item in done]
    if not sum(rows):
        raise read.refuse("NO_VARIANTS", "The VCF has no records.")
    split = sum(int(item.values["split"]) for item in done)
    if split:
        ctx.finding(read.split_note(split))
    layout = Layout(len(file.samples), sum(rows), params.interchange, file.dosage, params.part_variants)
    _announce(layout, ctx)
    sex = np.zeros(len(file.samples), np.int8)
    for fact in facts:
        sex[fact["haploid_on_x"]] = 1  # one allele on X: a man; whoever has none says nothing
    if sex.any():
        sex[sex == 0] = 2
    header = _header_of(file.samples, sex, seen, filters, params.build or file.build, "vcf", ctx)
    following = {
        "layout": layout.as_dict(), "rows": rows, "contigs": seen, "filters": filters, "header": header,
        "folders": [str(item.folder) for item in done], "inputs": list(done[0].part.inputs),
    }  # fmt: skip
    return Next(following)


def _note_duplicates(made: store.GenotypeStore, ctx: Context) -> None:
    contig, position = made.contig(), made.position()
    same = np.flatnonzero((contig[1:] == contig[:-1]) & (position[1:] == position[:-1]))
    if not len(same):
        return
    alleles = made.alleles()
    seen: set[tuple[Any, ...]] = set()
    twice = 0
    for row in np.unique(np.concatenate([same, same + 1])):
        key = (int(contig[row]), int(position[row]), *alleles[row])
        twice += key in seen
        seen.add(key)
    if twice:
        ctx.finding(
            Finding(
                "DUPLICATE_VARIANTS", f"{twice} rows repeat a variant (position and alleles); all were kept.", "note",
                numbers={"rows": twice},
            )
        )  # fmt: skip


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
