"""Genotypes at two bits beside plink2, dask and bio2zarr: scores, association, counts, sizes, conversion."""

from __future__ import annotations

import itertools
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs.home import new_home
from permed_compute.client import Client, open_client
from permed_compute.execution import records
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

TITLE = "Genotypes: scores, association, counts, sizes, conversion"
WHY = (
    "Cohorts of a quarter of a million people are read more often than anything else is done with them. Simulated"
    " people with linkage (msprime; LD decides how well genotypes compress), with and without missing calls; the same"
    " variants, weights and covariates for everybody; every figure is CPU seconds (user and system, of the process and"
    " its children), because machines are shared; both sides read their own format from the disk cache and use one"
    " thread. Scores are compared with plink2's each time. plink2 is Debian's (2.00a3.5, 2022): newer ones are faster."
    " Goals: one score ≥ 1.5× and 32 scores ≥ 4× as cheap as plink2's."
)


def cases(quick: bool) -> list[Case]:
    rig = _Rig(*((300, 2000) if quick else (5000, 20_000)))
    seconds = {"unit": "CPU s", "better": "lower", "close": rig.close}

    def case(group: str, name: str, measure: Callable[[], float], **more: Any) -> Case:
        return Case(group, name, measure=measure, **(seconds | more))

    one, many = "PRS, 1 score", "PRS, 32 scores"
    gappy, whole = "linear GWAS, 5 covariates, 1 % missing", "linear GWAS, 5 covariates, none missing"
    scaling = "logistic GWAS (Wald) of 4,000 variants on Ray, first start to last publication"
    bytes_scored, bytes_associated = "packed input, scoring (32)", "packed input, association"
    rate = {"unit": "GB/s", "better": "higher"}
    counts, size, convert = "counts of all variants", "bits a genotype", "a quarter of the variants out of VCF"
    return [
        case(one, "ours", lambda: rig.score(1), goal="≥ 1.5 × plink2", ratio=1 / 1.5),
        case(one, "plink2 --score", lambda: rig.plink_score(1), peer=True),
        case(one, "dask on int8 Zarr", lambda: rig.dask_score(1), peer=True),
        case(many, "ours", lambda: rig.score(32), goal="≥ 4 × plink2", ratio=1 / 4),
        case(many, "plink2 --score", lambda: rig.plink_score(32), peer=True),
        case(many, "dask on int8 Zarr", lambda: rig.dask_score(32), peer=True),
        case(gappy, "ours", lambda: rig.linear("gappy")),
        case(gappy, "plink2 --glm", lambda: rig.plink_linear("gappy"), peer=True),
        case(whole, "ours", lambda: rig.linear("whole")),
        case(whole, "plink2 --glm", lambda: rig.plink_linear("whole"), peer=True),
        case(counts, "ours", rig.counts),
        case(counts, "plink2 --geno-counts", rig.plink_counts, peer=True),
        case(size, "packed2", lambda: rig.bits("packed2"), unit="bits"),
        case(size, "PGEN", lambda: rig.bits("pgen"), unit="bits", peer=True),
        case(size, "bed", lambda: rig.bits("bed"), unit="bits", peer=True),
        case(size, "BCF", lambda: rig.bits("bcf"), unit="bits", peer=True),
        case(size, "our call_genotype (VCF Zarr)", lambda: rig.bits("call_genotype"), unit="bits", peer=True),
        case(size, "bio2zarr's call_genotype (VCF Zarr)", lambda: rig.bits("bio2zarr"), unit="bits", peer=True),
        case(convert, "ours, VCF to VCF Zarr and packed2", rig.convert),
        case(convert, "bio2zarr vcf2zarr", rig.bio2zarr, peer=True),
        case(scaling, "2 workers", lambda: rig.on_ray(2), unit="s", goal="≥ 1.8 × as fast as 1", ratio=1 / 1.8),
        case(scaling, "1 worker", lambda: rig.on_ray(1), unit="s", peer=True),
        case(bytes_scored, "on a GPU", lambda: rig.on_gpu("score"), **rate),
        case(bytes_scored, "the CPU's kernels", lambda: rig.gigabytes() / rig.score(32), peer=True, **rate),
        case(bytes_associated, "on a GPU", lambda: rig.on_gpu("products"), **rate),
        case(bytes_associated, "the CPU's kernels", lambda: rig.gigabytes() / rig.linear("gappy"), peer=True, **rate),
    ]  # fmt: skip


def _cpu() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _timed(work: Callable[[], object]) -> float:
    began = _cpu()
    work()
    return _cpu() - began


def _codes(store: Any, rows: int) -> np.ndarray:
    from permed_compute.workloads.omics import packed as bits

    count = min(rows, store.variants)
    return bits.unpack(np.concatenate([store.packed(a, b) for a, b in store.chunks(0, count)]), store.samples)


class _Rig:
    """Simulated people in every format, made when first asked for."""

    def __init__(self, samples: int, variants: int) -> None:
        self.samples, self.variants = samples, variants
        self._stack = ExitStack()
        self._warm: set[str] = set()
        self._client: Client | None = None
        self._runs = itertools.count()

    def close(self) -> None:
        self._stack.close()
        self.__dict__.pop("folder", None)
        self._client = None

    @cached_property
    def folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="permed-omics-"))
        self._stack.callback(shutil.rmtree, folder, True)
        if shutil.which("plink2") is None:
            raise LeftOutError("plink2 is not installed (make real-parts)")
        self._simulate(folder)
        return folder

    def _plink(self, folder: Path, *words: object) -> str:
        done = subprocess.run(
            ["plink2", "--threads", "1", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-300:] + done.stderr[-300:])
        return done.stdout

    def _simulate(self, folder: Path) -> None:
        try:
            import msprime
        except ImportError:
            raise LeftOutError("msprime is not installed (extra: dev)") from None
        from tests.workloads.omics.made import table, write_bed

        rng = np.random.default_rng(0)
        trees = msprime.sim_ancestry(
            self.samples,
            sequence_length=self.variants * 350,
            recombination_rate=1e-8,
            population_size=10_000,
            random_seed=1,
        )
        trees = msprime.sim_mutations(trees, rate=1e-8, random_seed=2, model=msprime.BinaryMutationModel())
        for name, missing in (("gappy", 0.01), ("whole", 0.0)):
            rows = []
            for variant in trees.variants():
                copies = variant.genotypes.reshape(-1, 2).sum(axis=1).astype(np.int8)
                if 0 < copies.sum() < 2 * self.samples:
                    rows.append(copies)
                if len(rows) == self.variants:
                    break
            matrix = np.stack(rows)
            for row in matrix:
                row[rng.random(self.samples) < missing] = 3
            write_bed(folder / name, matrix, rows=table(len(matrix)))
            self._plink(folder, "--bfile", name, "--make-pgen", "--out", name)
            self._store(folder, name)
        self._plink(folder, "--pfile", "gappy", "--export", "vcf", "bgz", "--out", "gappy")
        if shutil.which("bcftools"):
            subprocess.run(["bcftools", "view", "-Ob", "-o", "gappy.bcf", "gappy.vcf.gz"], cwd=folder, check=True)
        last = table(self.variants)[self.variants // 4 - 1][1]
        self._plink(folder, "--pfile", "gappy", "--chr", 1, "--to-bp", last, "--export", "vcf", "bgz", "--out", "some")
        if shutil.which("bcftools"):
            subprocess.run(["bcftools", "index", "some.vcf.gz"], cwd=folder, check=True)
        people = [f"person{k}" for k in range(self.samples)]
        x = rng.normal(size=(self.samples, 5))
        y = rng.normal(size=self.samples) + x[:, 0]
        lines = [f"{n} {y[k]} " + " ".join(map(str, x[k])) for k, n in enumerate(people)]
        (folder / "p.txt").write_text("#IID y c0 c1 c2 c3 c4\n" + "\n".join(lines) + "\n")
        weights = rng.normal(scale=0.01, size=(len(matrix), 32))
        np.save(folder / "weights.npy", weights)
        with (folder / "w.txt").open("w") as file:
            file.write("ID A " + " ".join(f"s{k}" for k in range(32)) + "\n")
            for row, w in zip(table(len(matrix)), weights, strict=True):
                file.write(f"{row[2]} {row[4]} " + " ".join(f"{v:.17g}" for v in w) + "\n")

    def _store(self, folder: Path, name: str) -> None:
        self._job("omics/convert", [str(folder / f"{name}.bed")], folder / f"store-{name}")

    def _job(self, workload: str, inputs: list[Any], root: Path, **params: object) -> Any:
        from tests.workloads.omics.made import job

        return job(workload, root, inputs, threads=1, **params)

    def store(self, name: str) -> Any:
        from permed_compute.storage.genotypes import GenotypeStore

        return GenotypeStore.find(self.folder / f"store-{name}" / "job" / "out")

    # ----------------------------------------------------------------------------------------- scores

    def score(self, count: int) -> float:
        import torch

        from permed_compute.workloads.omics import prs
        from permed_compute.workloads.omics.scores import Weights

        torch.set_num_threads(1)
        store = self.store("gappy")
        weight = np.load(self.folder / "weights.npy")[:, :count]
        shape = weight.shape
        weights = Weights(
            [f"s{k}" for k in range(count)], np.arange(shape[0]), weight, np.zeros(shape, bool), np.ones(shape, bool)
        )
        model = prs.scoring(store, weights)
        found: list[np.ndarray] = []
        self._once(f"score-{count}", lambda: prs.score_rows(model, 0, store.variants, "mean"))
        seconds = _timed(lambda: found.append(prs.score_rows(model, 0, store.variants, "mean")[0]))
        self._same_scores(found[0][:, :count], count)
        return seconds

    def _once(self, name: str, work: Callable[[], object]) -> None:
        """Compiled before it is timed: Numba keeps what it compiled on the disk, but loads it in each process."""
        if name not in self._warm:
            work()
            self._warm.add(name)

    def _same_scores(self, found: np.ndarray, count: int) -> None:
        self._run_plink_score(count)
        lines = (self.folder / f"s{count}.sscore").read_text().splitlines()
        theirs = np.array([[float(v) for v in line.split()[-count:]] for line in lines[1:]])
        if np.abs(theirs - found).max() > 1e-4 * max(1.0, np.abs(theirs).max() / 10):
            raise RuntimeError("The scores differ.")

    def _run_plink_score(self, count: int) -> None:
        columns = f"3-{2 + count}" if count > 1 else "3"
        self._plink(self.folder, "--pfile", "gappy", "--score", "w.txt", 1, 2, "header-read", "cols=+scoresums",
                    "--score-col-nums", columns, "--out", f"s{count}")  # fmt: skip

    def plink_score(self, count: int) -> float:
        self.store("gappy")
        return _timed(lambda: self._run_plink_score(count))

    def dask_score(self, count: int) -> float:
        try:
            import dask
            import dask.array as da
        except ImportError:
            raise LeftOutError("dask is not installed") from None
        import zarr

        from permed_compute.workloads.omics import packed as bits

        store = self.store("gappy")
        place = self.folder / "int8.zarr"
        if not place.exists():
            array = zarr.create_array(
                place, shape=(store.variants, store.samples), dtype=np.int8, chunks=(1000, store.samples)
            )
            for a, b in store.chunks(0, store.variants):
                array[a:b] = bits.unpack(store.packed(a, b), store.samples)
        weight = np.load(self.folder / "weights.npy")[:, :count].astype(np.float32)

        def run() -> None:
            with dask.config.set(scheduler="synchronous"):
                given = da.from_zarr(place).astype(np.float32)
                known = da.where(given == 3, np.nan, given)
                mean = da.nanmean(known, axis=1, keepdims=True)
                (da.where(da.isnan(known), mean, known).T @ weight).compute()

        return _timed(run)

    # ----------------------------------------------------------------------------------------- association

    def linear(self, name: str) -> float:
        import torch

        from permed_compute.workloads.omics import gwas
        from permed_compute.workloads.omics.association import LinearNull

        torch.set_num_threads(1)
        store = self.store(name)
        table = np.loadtxt(self.folder / "p.txt", skiprows=1, usecols=range(1, 7))
        x = np.column_stack([np.ones(len(table)), table[:, 1:]])
        model = gwas.Analysis(store, np.arange(store.samples), {"": LinearNull.of(table[:, 0], x)}, "linear")
        self._once(f"linear-{name}", lambda: gwas.associate(model, 0, 2000))
        return _timed(lambda: gwas.associate(model, 0, store.variants))

    def plink_linear(self, name: str) -> float:
        self.store(name)
        return _timed(
            lambda: self._plink(self.folder, "--pfile", name, "--glm", "hide-covar", "--covar", "p.txt",
                                "--covar-name", "c0-c4", "--pheno", "p.txt", "--pheno-name", "y", "--out", f"g-{name}")
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------- counts, sizes

    def counts(self) -> float:
        from permed_compute.workloads.omics import packed as bits

        store = self.store("gappy")

        def run() -> None:
            for a, b in store.chunks(0, store.variants):
                bits.counts(store.packed(a, b), store.samples)

        self._once("counts", run)
        return _timed(run)

    def plink_counts(self) -> float:
        self.store("gappy")
        return _timed(lambda: self._plink(self.folder, "--pfile", "gappy", "--geno-counts", "--out", "counts"))

    def bits(self, kind: str) -> float:
        store = self.store("gappy")
        peer = self.folder / "peer.vcz"
        if kind == "bio2zarr" and not peer.exists():
            self.bio2zarr()
        place = {
            "packed2": store.root / "packed2", "call_genotype": store.root / "call_genotype",
            "bio2zarr": peer / "call_genotype",
        }.get(kind)  # fmt: skip
        files = [f for f in place.rglob("*") if f.is_file()] if place else [self.folder / f"gappy.{kind}"]
        if not all(file.exists() for file in files):
            raise LeftOutError("bcftools is not installed (make real-parts)")
        variants = store.variants // 4 if kind == "bio2zarr" else store.variants
        return 8 * sum(file.stat().st_size for file in files) / (variants * store.samples)

    # ----------------------------------------------------------------------------------------- Ray, GPU

    def on_ray(self, workers: int) -> float:
        """Seconds from the first part's start to the last publication, as the attempt's records say."""
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self._stack.enter_context(new_home("ray"))))
            self._few()
        # A phenotype of another name each time: a part that was computed before is not computed again.
        spec = JobSpec(
            name="scaling", workload="omics/gwas",
            inputs=({"name": "genotypes", "path": str(self.folder / "store-few" / "job" / "out")},
                    {"name": "phenotypes", "path": str(self.folder / "b.txt")}),
            params={"phenotype": f"b{next(self._runs)}", "model": "logistic", "test": "wald",
                    "covariates": [f"c{k}" for k in range(5)]},
            resources={"workers": workers, "cpus": 1, "memory": "1GiB"},
        )  # fmt: skip
        [job] = self._client.wait([job.id for job in self._client.submit(spec)])
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.detail.get('sentence', '')}")
        rows, _ = records.read(self._client.paths(job).attempt(job.attempt).records())
        done = [row for row in rows if row["kind"] == "part" and row["state"] == "DONE"]
        return max(row["started"] / 1000 + row["seconds"] for row in done) - min(row["started"] for row in done) / 1000

    def _few(self) -> None:
        """The first 4,000 variants as a store of four parts, their people known to the client's home."""
        from tests.workloads.omics.made import table, write_bed

        store = self.store("whole")
        bed = write_bed(self.folder / "few", _codes(store, 4000), rows=table(min(4000, store.variants)))
        spec = JobSpec(name="few", workload="omics/convert", inputs=(str(bed),), params={"part_variants": 1000})
        client = self._client
        assert client is not None
        [job] = client.wait([job.id for job in client.submit(spec)])
        target = self.folder / "store-few" / "job" / "out"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(client.paths(job).results, target)
        lines = (self.folder / "p.txt").read_text().splitlines()[1:]
        head = " ".join(f"b{k}" for k in range(200))
        told = [f"#IID {head} c0 c1 c2 c3 c4"]
        for line in lines:
            name, y, *x = line.split()
            told.append(" ".join([name, *["1" if float(y) > 1 else "0"] * 200, *x]))
        (self.folder / "b.txt").write_text("\n".join(told) + "\n")

    def gigabytes(self) -> float:
        """Of packed genotypes."""
        store = self.store("gappy")
        return store.variants * store.layout.row_bytes / 1e9

    def on_gpu(self, what: str) -> float:
        """GB/s of packed bytes, from this machine's memory to sums."""
        import torch

        if not torch.cuda.is_available():
            raise LeftOutError("no CUDA device")
        from permed_compute.workloads.omics import device

        store = self.store("gappy")
        rng = np.random.default_rng(0)
        blocks = [store.packed(a, b) for a, b in store.chunks(0, store.variants)]
        weight, right = rng.normal(size=(1000, 32)), rng.normal(size=(store.samples, 7))
        table = np.tile([0.0, 1.0, 2.0, 0.0], (1000, 1))

        def run() -> None:
            for block in blocks:
                if what == "score":
                    device.score(block, weight[: len(block)], weight[: len(block)], store.samples, "cuda")
                else:
                    device.products(block, table[: len(block)], right, "cuda")

        run()
        began = time.perf_counter()
        run()
        return self.gigabytes() / (time.perf_counter() - began)

    def convert(self) -> float:
        self.store("gappy")
        root = self.folder / "converted"
        shutil.rmtree(root, ignore_errors=True)
        self._once("convert", lambda: self._job("omics/convert", [str(self.folder / "gappy.bed")], self.folder / "w"))
        return _timed(lambda: self._job("omics/convert", [str(self.folder / "some.vcf.gz")], root))

    def bio2zarr(self) -> float:
        from bio2zarr import vcf

        self.store("gappy")
        place = self.folder / "peer.vcz"
        shutil.rmtree(place, ignore_errors=True)
        return _timed(lambda: vcf.convert([self.folder / "some.vcf.gz"], place, worker_processes=0, zarr_format=3))
