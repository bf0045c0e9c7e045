"""A frequency register: allele frequencies by population that give nobody away, released as Beacon v2 JSON and Parquet.

Inputs: `genotypes`; `populations` (a table with columns IID and POPULATION); optionally `withdrawn` (one identifier a
line: these people are counted nowhere any more). The rules stand in `disclosure`; one row a variant, one part a block.

`params` of the job:
    register      the register's folder; made where it is not there. Only its owner may read it
    policy        k5       k5: at most 5 carriers withheld; k7-rounded; k10
    pad           true     where few people left or joined, exchange further ones by chance; false: refuse

Results: `frequencies.parquet` (chrom, pos, ref, alt, population, ac, an, af), `beacon.jsonl.gz` (a line a variant:
Beacon v2 `frequencyInPopulations`), `release.json`; the same in the register, with the release's audit entry.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.storage.register import Register, Release
from permed_compute.workloads.omics import counting, disclosure, phenotypes
from permed_compute.workloads.omics.counting import AlleleCounts
from permed_compute.workloads.omics.disclosure import Policy, Published
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.omics.prs import inputs_of, open_store
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "2"
TOTAL = "TOTAL"
_TURNS = 20
"""Draws before a population is called too small to exchange people with every earlier release."""


@dataclass(frozen=True, slots=True)
class Params:
    register: str = ""
    policy: str = "k5"
    pad: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        checked = Checked("omics/frequency", given, cls)
        checked.one_of("policy", *disclosure.PRESETS)
        if not given.get("register"):
            checked.problem("register", "is missing.", "Write the register's folder.")
        return checked.done()


# ------------------------------------------------------------------------------------------------ who is counted


@dataclass(frozen=True, slots=True)
class Count:
    """Who is counted and who is set aside, by population: indices of samples."""

    counted: Mapping[str, list[int]]
    aside: Mapping[str, list[int]]

    def digest(self, samples: int) -> str:
        groups = np.full(samples, -1, np.int16)
        for number, people in enumerate(self.counted.values()):
            groups[people] = number
        return hashlib.sha256(groups.tobytes()).hexdigest()


def count_of(spec: JobSpec, store: GenotypeStore, ctx: Context) -> Count:
    """The people of the job's populations, the withdrawn left out; a part of them is counted (`disclosure`, rule 4).

    Who is set aside is told nowhere. The chance is drawn from the home's key, so that a job that is run again counts
    the same people. Raises `RefusedInput` DIFFERENCING.
    """
    params = Params.of(spec.params)
    policy = disclosure.preset(params.policy)
    found = _populations(spec, store, ctx)
    releases = Register(Path(params.register)).releases()
    for release in releases:
        _check_series(release, policy, found)
    place = {str(name): k for k, name in enumerate(store.sample_id)}
    counted, aside = {}, {}
    for name, people in found.items():
        mine = _counted(name, people, releases, policy, ctx, pad=params.pad)
        counted[name] = sorted(place[person] for person in mine)
        aside[name] = sorted(place[person] for person in people - mine)
    return Count(counted, aside)


def _populations(spec: JobSpec, store: GenotypeStore, ctx: Context) -> dict[str, frozenset[str]]:
    """Pseudonyms by population, in the order of the names."""
    files = inputs_of(spec, "populations")
    if not files:
        raise refuse("TABLE_UNREADABLE", "The job names no input `populations`.")
    table = phenotypes.read_people(files[0], store, ctx.pseudonym)
    if "POPULATION" not in table.columns:
        raise refuse("COLUMN_ABSENT", "The table of populations has no column POPULATION.")
    gone = _withdrawn(spec, ctx)
    found: dict[str, set[str]] = {}
    for k, name in enumerate(table.columns["POPULATION"]):
        if name and name != "NA" and store.sample_id[k] not in gone:
            if name == TOTAL:
                raise refuse("TABLE_UNREADABLE", f"A population may not be called {TOTAL}.")
            found.setdefault(name, set()).add(str(store.sample_id[k]))
    return {name: frozenset(found[name]) for name in sorted(found)}


def _counted(
    name: str, people: frozenset[str], releases: Sequence[Release], policy: Policy, ctx: Context, *, pad: bool
) -> frozenset[str]:
    told = [release for release in releases if len(release.members[name]) >= policy.least_people]
    mine: frozenset[str] | None
    mine = disclosure.first_count(people, policy, random.Random(ctx.pseudonym(f"count-{name}-{_digest(people)}")))
    if not told or len(mine) < policy.least_people:
        return mine  # nothing was shown of it, or will be
    before, known = told[-1].members[name], told[-1].members[name] | told[-1].aside[name]
    if before <= people <= known:
        return before  # nobody left who was counted, and nobody is new
    if not pad and not disclosure.apart(people - (known - before), before, policy):
        raise refuse(
            "DIFFERENCING",
            f"Fewer than {policy.exchange} people left or joined a population since release {told[-1].number}: the"
            " difference would tell of them.",
            remedy="Wait for more changes, or write `params: {pad: true}`: further people are exchanged by chance.",
        )  # fmt: skip
    for turn in range(_TURNS):
        chance = random.Random(ctx.pseudonym(f"count-{name}-{told[-1].facts['digest']}-{turn}-{_digest(people)}"))
        mine = disclosure.next_count(people, before, policy, chance) if pad else people - (known - before)
        if mine is not None and all(disclosure.apart(mine, release.members[name], policy) for release in told):
            return mine
    raise refuse(
        "DIFFERENCING", "A population is too small to hide who left it or joined.", remedy="Wait for more changes."
    )


def _digest(people: frozenset[str]) -> str:
    return hashlib.sha256("".join(sorted(people)).encode()).hexdigest()


def _withdrawn(spec: JobSpec, ctx: Context) -> set[str]:
    names = {
        line.strip() for file in inputs_of(spec, "withdrawn") for line in file.read_text(encoding="utf-8").splitlines()
    }
    return {ctx.pseudonym(name) for name in names if name} | names


def _check_series(release: Release, policy: Policy, members: Mapping[str, Any]) -> None:
    before = release.facts
    if before["policy"]["name"] != policy.name:
        raise refuse(
            "DIFFERENCING", f"Release {release.number} was made under policy {before['policy']['name']}.",
            remedy="One register keeps one policy: what two show together is more than either.",
        )  # fmt: skip
    if sorted(members) != sorted(before["populations"]):
        raise refuse(
            "DIFFERENCING", f"Release {release.number} has other populations.",
            remedy="One register keeps its populations: other cuts through the same people can be subtracted.",
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ plan, run


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    store = open_store(spec)
    about = count_of(spec, store, ctx).digest(store.samples)
    header = [ctx.digest(file) for file in store.header_files()]
    return [
        Part(
            f"rows-{part:05d}", (*header, *(ctx.digest(file) for file in store.files(part))),
            {"part": part, "groups": about, "policy": Params.of(spec.params).policy}, (str(store.root),),
        )
        for part in range(store.layout.parts)
    ]  # fmt: skip


def load_model(spec: JobSpec, ctx: Context) -> list[np.ndarray]:
    """A bool array over the samples for each population."""
    store = open_store(spec)
    masks = []
    for people in count_of(spec, store, ctx).counted.values():
        mask = np.zeros(store.samples, bool)
        mask[people] = True
        masks.append(mask)
    return masks


def run(part: Part, model: list[np.ndarray], ctx: Context) -> PartResult:
    """The block's counts of each population as the policy lets them be seen."""
    store = GenotypeStore(Path(part.sources[0]))
    start, stop = store.layout.rows(int(part.params["part"]))
    found: list[list[AlleleCounts]] = [[] for _ in model]
    for a, b in store.chunks(start, stop):
        packed = store.packed(a, b)
        kind = counting.kind_of([store.contigs[k] for k in store.contig(a, b)], store.position(a, b), store.build)
        for number, mask in enumerate(model):
            found[number].append(counting.allele_counts(packed, kind, store.sex, mask))
    # Exact counts leave this process only through the policy: a part's files are linked into the job's results.
    policy = disclosure.preset(Params.of(ctx.spec.params).policy)
    made = disclosure.publish(
        [AlleleCounts.joined(pieces) for pieces in found], [int(mask.sum()) for mask in model], policy
    )
    np.savez(ctx.out / "published.npz", ac=made.ac, an=made.an)
    return PartResult({"variants": stop - start})


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    import pyarrow.parquet as pq

    params = Params.of(ctx.spec.params)
    policy = disclosure.preset(params.policy)
    store = open_store(ctx.spec)
    done = sorted(results, key=lambda item: int(item.part.params["part"]))
    if len(done) != store.layout.parts:
        raise refuse("RELEASE_INCOMPLETE", f"{store.layout.parts - len(done)} blocks could not be counted: no release.")
    register = Register(Path(params.register))
    with register.turn():
        count = count_of(ctx.spec, store, ctx)
        if any(item.part.params["groups"] != count.digest(store.samples) for item in done):
            raise refuse(
                "RELEASE_OVERTAKEN", "Another release was added while these people were counted.",
                remedy="Submit the job again.",
            )  # fmt: skip
        members = count.counted
        tables = [np.load(item.folder / "published.npz") for item in done]
        new = Published(*(np.concatenate([table[name] for table in tables]) for name in ("ac", "an")))
        names = [*members, TOTAL]
        withheld = 0
        for release in register.releases():
            earlier = earlier_counts(release, store, names)
            moved = _moved(release, store, members, policy)
            new, cells = disclosure.withhold_differences(new, earlier, *moved, policy)
            withheld += cells
        facts = _facts(ctx, store, members, new, policy, withheld)
        made = ctx.scratch / "release"
        (made / "public").mkdir(parents=True, exist_ok=True, mode=0o700)
        (made / "private").mkdir(exist_ok=True, mode=0o700)
        pq.write_table(_table(store, new, names), made / "public" / "frequencies.parquet", compression="zstd")
        _write_beacon(made / "public" / "beacon.jsonl.gz", store, new, names, facts)
        # Which rule withheld a cell is nobody's business: their number stays here.
        write_json(made / "public" / "release.json", {name: facts[name] for name in facts if name != "withheld"})
        write_json(made / "private" / "facts.json", {"withheld": facts["withheld"]})
        for file, groups in (("members.json", count.counted), ("aside.json", count.aside)):
            told = {name: [str(store.sample_id[k]) for k in people] for name, people in groups.items()}
            write_json(made / "private" / file, told)
        release = register.add(made, facts)
    for name in ("frequencies.parquet", "beacon.jsonl.gz", "release.json"):
        ctx.log_artifact(release.folder / "public" / name, name)
    values = {"release": release.number, **{name: facts[name] for name in ("people", "variants", "cells", "withheld")}}
    return Result(values=values, metrics={"variants": float(facts["variants"])})


def _moved(
    release: Release, store: GenotypeStore, members: Mapping[str, Sequence[int]], policy: Policy
) -> tuple[np.ndarray, np.ndarray]:
    """(variants, populations) each: alleles, at most, of those who left a population's count since a release, and of
    those who came into it. Of a population that was withheld for its size that release told nothing: all came."""
    kind = counting.kind_of([store.contigs[k] for k in store.contig()], store.position(), store.build)
    sex = dict(zip(map(str, store.sample_id), store.sex.tolist(), strict=True))
    left, joined = [], []
    for name, people in members.items():
        now = {str(store.sample_id[k]) for k in people}
        before = release.members[name]
        before = before if len(before) >= policy.least_people else frozenset()
        left.append(_alleles(before - now, sex)[kind])
        joined.append(_alleles(now - before, sex)[kind])
    return np.stack(left, axis=1), np.stack(joined, axis=1)


def _alleles(people: set[str] | frozenset[str], sex: Mapping[str, int]) -> np.ndarray:
    """By kind of contig (autosome, X, Y, mitochondrion). Who is not in this store any more may be a man or a woman."""
    men = sum(sex.get(person) == 1 for person in people)
    women = sum(sex.get(person, 1) != 1 for person in people)
    return np.array([2 * len(people), len(people) + women, men, len(people)])


def _facts(
    ctx: Context,
    store: GenotypeStore,
    members: Mapping[str, Sequence[int]],
    new: Published,
    policy: Policy,
    withheld: int,
) -> dict[str, Any]:
    digest = hashlib.sha256(new.ac.tobytes() + new.an.tobytes())
    for name, people in members.items():
        digest.update(name.encode() + b"".join(str(store.sample_id[k]).encode() for k in people))
    return {
        "digest": digest.hexdigest(), "policy": asdict(policy), "build": store.build,
        "populations": list(members), "people": {name: len(people) for name, people in members.items()},
        "variants": int(new.any.sum()), "cells": int((new.an >= 0).sum()), "withheld": withheld,
        "withdrawn": len(inputs_of(ctx.spec, "withdrawn")) > 0,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "account": ctx.spec.account, "purpose": ctx.spec.purpose.value,
    }  # fmt: skip


def _table(store: GenotypeStore, new: Published, names: Sequence[str]) -> Any:
    import pyarrow as pa

    rows, columns = np.nonzero(new.an >= 0)
    contig, position, alleles = store.contig(), store.position(), store.alleles()
    ac, an = new.ac[rows, columns], new.an[rows, columns]
    return pa.table(
        {
            "chrom": [store.contigs[contig[row]] for row in rows], "pos": position[rows],
            "ref": alleles[rows, 0].tolist(), "alt": alleles[rows, 1].tolist(),
            "population": [names[column] for column in columns.tolist()], "ac": ac, "an": an,
            "af": ac / np.maximum(an, 1),
        }
    )  # fmt: skip


def earlier_counts(release: Release, store: GenotypeStore, names: Sequence[str]) -> Published:
    """An earlier release's table in the order of this store's variants; -1 where it showed nothing."""
    import pyarrow.parquet as pq

    table = pq.read_table(release.table).to_pydict()
    contig, position, alleles = store.contig(), store.position(), store.alleles()
    place = {
        (store.contigs[contig[k]], int(position[k]), alleles[k, 0], alleles[k, 1]): k for k in range(store.variants)
    }
    column = {name: k for k, name in enumerate(names)}
    ac, an = (np.full((store.variants, len(names)), -1, np.int64) for _ in range(2))
    keys = zip(table["chrom"], table["pos"], table["ref"], table["alt"], strict=True)
    for n, key in enumerate(keys):
        row = place.get(key)
        if row is not None:
            ac[row, column[table["population"][n]]] = table["ac"][n]
            an[row, column[table["population"][n]]] = table["an"][n]
    return Published(ac, an)


def _write_beacon(
    path: Path, store: GenotypeStore, new: Published, names: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Beacon v2 genomicVariations: `frequencyInPopulations` of every variant that has something to show."""
    contig, position, alleles = store.contig(), store.position(), store.alleles()
    with gzip.GzipFile(path, "wb", compresslevel=3, mtime=0) as file:
        for row in np.flatnonzero(new.any):
            chrom, at = store.contigs[contig[row]], int(position[row])
            ref, alt = str(alleles[row, 0]), str(alleles[row, 1])
            shown = [
                {"population": names[k], "alleleFrequency": float(new.ac[row, k] / max(1, new.an[row, k])),
                 "alleleCount": int(new.ac[row, k]), "alleleNumber": int(new.an[row, k])}
                for k in np.flatnonzero(new.an[row] >= 0).tolist()
            ]  # fmt: skip
            entry = {
                "variantInternalId": f"{chrom}-{at}-{ref}-{alt}",
                "variation": {
                    "location": {
                        "type": "SequenceLocation", "sequence_id": f"{facts['build'] or 'unknown'}:{chrom}",
                        "interval": {"type": "SequenceInterval", "start": {"type": "Number", "value": at - 1},
                                     "end": {"type": "Number", "value": at - 1 + len(ref)}},
                    },
                    "referenceBases": ref, "alternateBases": alt,
                    "variantType": "SNP" if len(ref) == len(alt) == 1 else "INDEL",
                },
                "frequencyInPopulations": [
                    {"source": "permed_compute frequency register",
                     "sourceReference": f"policy:{facts['policy']['name']}", "frequencies": shown}
                ],
            }  # fmt: skip
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")


WORKLOAD = Map(plan=plan, model=load_model, run=run, reduce=reduce, version=VERSION)
