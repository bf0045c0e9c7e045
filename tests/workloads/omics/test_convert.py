"""From every format to the same store; what is refused, and how it is named."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import zarr

from permed_compute.errors import RefusedInput, SpecError, WorkloadError
from permed_compute.storage.genotypes import GenotypeStore, Layout, check_space
from permed_compute.testing.context import LocalContext
from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.convert import WORKLOAD

from .made import codes, genotypes, job, people, store_of, table, write_bed, write_vcf


def refusal(call) -> str:
    with pytest.raises(RefusedInput) as caught:
        call()
    return caught.value.finding.code


def vcf_line(contig="1", position=100, ref="A", alt="C", calls=("0/1", "1/1", "./."), more="GT") -> str:
    return "\t".join([contig, str(position), ".", ref, alt, ".", ".", ".", more, *calls])


def test_bed_becomes_a_store_in_several_parts_that_any_zarr_reader_opens(tmp_path):
    copies = genotypes(2500, 33)
    made, outcome = store_of(write_bed(tmp_path / "in" / "a", copies, sex=2), tmp_path / "w", part_variants=1000)
    assert len(outcome.done) == 3 and made.layout.parts == 3
    assert (bits.unpack(made.packed(0, 2500), 33) == copies).all()
    plain = zarr.open_group(made.root, mode="r")
    genotype = plain["call_genotype"][:]
    assert genotype.shape == (2500, 33, 2)
    assert (np.where((genotype < 0).any(axis=2), 3, genotype.sum(axis=2)) == copies).all()
    assert plain["variant_allele"][3].tolist() == ["T", "G"] and plain.attrs["vcf_zarr_version"] == "0.4"
    assert made.sex.tolist() == [2] * 33
    assert made.position(1400, 1402).tolist() == [15000, 15010]


def test_no_identifier_is_in_the_store(tmp_path):
    made, _ = store_of(write_bed(tmp_path / "in" / "a", genotypes(20, 9)), tmp_path / "w")
    context = LocalContext(tmp_path / "c", None, seed=0)
    assert made.sample_id.tolist() == [context.pseudonym(name) for name in people(9)]
    assert not any(b"person3" in file.read_bytes() for file in made.root.rglob("*") if file.is_file())


def test_few_files_and_a_true_estimate(tmp_path):
    made, outcome = store_of(write_bed(tmp_path / "in" / "a", genotypes(3000, 200)), tmp_path / "w", part_variants=1000)
    needed, files = made.layout.estimate()
    assert outcome.result.values["bytes"] <= needed and outcome.result.values["files"] <= files
    with pytest.raises(WorkloadError, match="GiB are free"):
        check_space(tmp_path, 2**60, 1)


def test_multiallelic_haploid_missing_and_phase(tmp_path):
    lines = [
        vcf_line(position=100, alt="C,G", calls=("0/1", "1|2", "2/2")),
        vcf_line(position=200, calls=("./1", ".", "0/0")),
        vcf_line(contig="chrX", position=50, calls=("1", "0", "0/1")),
    ]
    made, outcome = store_of(write_vcf(tmp_path / "a.vcf", lines, people(3)), tmp_path / "w")
    assert bits.unpack(made.packed(0, 4), 3).tolist() == [[1, 1, 0], [0, 1, 2], [3, 3, 0], [2, 0, 1]]
    assert made.split().tolist() == [True, True, False, False] and made.contigs == ["1", "X"]
    assert made.sex.tolist() == [1, 1, 2]
    assert [finding.code for finding in outcome.context.findings] == ["MULTIALLELIC_SPLIT"]
    group = zarr.open_group(made.root, mode="r")
    assert group["call_genotype"][1].tolist() == [[0, 0], [0, 1], [1, 1]]
    assert group["call_genotype_phased"][0].tolist() == [False, True, False]
    assert group["call_genotype"][3].tolist() == [[1, -2], [0, -2], [0, 1]]


def test_dosages_are_kept(tmp_path):
    header = '##FORMAT=<ID=DS,Number=A,Type=Float,Description="Dosage">\n'
    lines = [vcf_line(calls=("0/1:0.93", "0/0:0.25", "./.:."), more="GT:DS"), vcf_line(position=200)]
    made, _ = store_of(write_vcf(tmp_path / "a.vcf", lines, people(3), header), tmp_path / "w")
    assert (made.dosage(0, 2) / 16384)[:, :2] == pytest.approx(np.array([[0.93, 0.25], [1, 2]]), abs=1e-4)
    assert made.dosage(0, 2)[:, 2].tolist() == [65535, 65535]
    assert np.isnan(zarr.open_group(made.root, mode="r")["call_DS"][0, 2])


def test_a_vcf_zarr_is_read_again(tmp_path):
    lines = [vcf_line(position=100, alt="C,G", calls=("0/1", "1|2", "2/2")), vcf_line(position=200)]
    first, _ = store_of(write_vcf(tmp_path / "a.vcf", lines, people(3)), tmp_path / "w")
    again, _ = store_of(first.root, tmp_path / "w2")
    assert (again.packed(0, 3) == first.packed(0, 3)).all() and (again.alleles() == first.alleles()).all()


def test_bio2zarrs_zarr_is_read(tmp_path):
    from bio2zarr import plink

    copies = genotypes(50, 11)
    bed = write_bed(tmp_path / "in" / "a", copies)
    plink.convert(bed.with_suffix(""), tmp_path / "b.vcz", zarr_format=3)
    made, _ = store_of(tmp_path / "b.vcz", tmp_path / "w")
    counted = bits.counts(made.packed(0, 50), 11)
    swapped = made.alleles()[:, 0] != [row[3] for row in table(50)]
    assert (np.where(swapped[:, None], counted[:, [2, 1, 0, 3]], counted) == codes(copies)).all()


def test_a_part_is_the_same_part_whatever_else_is_in_the_job(tmp_path):
    bed = write_bed(tmp_path / "in" / "a", genotypes(1500, 20))
    spec = __import__("permed_compute.spec", fromlist=["JobSpec"]).JobSpec(
        name="t", workload="omics/convert", inputs=(str(bed),), params={"part_variants": 1000}
    )
    one, two = (list(WORKLOAD.plan(spec, {}, LocalContext(tmp_path / n, spec))) for n in ("a", "b"))
    assert [(p.name, p.inputs, p.params) for p in one] == [(p.name, p.inputs, p.params) for p in two]


def test_duplicate_variants_are_told(tmp_path):
    rows = table(4)
    rows[2] = rows[1]
    _, outcome = store_of(write_bed(tmp_path / "in" / "a", genotypes(4, 9), rows=rows), tmp_path / "w")
    (finding,) = outcome.context.findings
    assert finding.code == "DUPLICATE_VARIANTS" and finding.numbers == {"rows": 1}


def test_truncated_files_are_refused_by_name(tmp_path):
    bed = write_bed(tmp_path / "in" / "a", genotypes(40, 21))
    bed.write_bytes(bed.read_bytes()[:-7])
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(bed)])) == "BED_TRUNCATED"
    whole = write_vcf(tmp_path / "a.vcf", [vcf_line()], people(3)).read_bytes()
    (tmp_path / "b.vcf").write_bytes(whole[:-3])
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(tmp_path / "b.vcf")])) == "VCF_TRUNCATED"
    (tmp_path / "c.vcf.gz").write_bytes(gzip.compress(whole)[:-9])
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(tmp_path / "c.vcf.gz")])) == "VCF_TRUNCATED"


def test_duplicate_people_are_named_by_pseudonym(tmp_path):
    path = write_vcf(tmp_path / "a.vcf", [vcf_line()], ["anna", "berit", "anna"])
    with pytest.raises(RefusedInput) as caught:
        job("omics/convert", tmp_path / "w", [str(path)])
    assert "anna" not in str(caught.value)
    assert caught.value.finding.code in ("DUPLICATE_SAMPLES", "VCF_UNREADABLE")
    bed = write_bed(tmp_path / "in" / "a", genotypes(4, 3))
    bed.with_suffix(".fam").write_text("0 anna 0 0 0 -9\n0 berit 0 0 0 -9\n0 anna 0 0 0 -9\n")
    with pytest.raises(RefusedInput) as caught:
        job("omics/convert", tmp_path / "w2", [str(bed)])
    assert caught.value.finding.code == "DUPLICATE_SAMPLES"
    assert LocalContext(tmp_path / "c", None, seed=0).pseudonym("anna")[:12] in str(caught.value)


def test_unsorted_and_other_build(tmp_path):
    rows = table(5)
    rows[3] = ("1", 5, *rows[3][2:])
    bed = write_bed(tmp_path / "in" / "a", genotypes(5, 9), rows=rows)
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(bed)])) == "UNSORTED_VARIANTS"
    far = [("21", 47_000_000, "rs1", "A", "C")]  # 46.7 million in GRCh38, 48.1 in GRCh37
    bed = write_bed(tmp_path / "in" / "b", genotypes(1, 9), rows=far)
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(bed)], build="GRCh38")) == "WRONG_BUILD"
    assert store_of(bed, tmp_path / "w2", build="GRCh37")[0].build == "GRCh37"
    header = "##contig=<ID=chr2,length=243199373>\n"
    path = write_vcf(tmp_path / "a.vcf", [vcf_line(contig="chr2")], people(3), header)
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(path)], build="GRCh38")) == "WRONG_BUILD"


def test_wrong_parameters_are_named_all_at_once(tmp_path):
    bed = write_bed(tmp_path / "in" / "a", genotypes(4, 3))
    with pytest.raises(SpecError) as caught:
        job("omics/convert", tmp_path / "w", [str(bed)], bild="x", build="hg18", part_variants=1500)
    assert len(caught.value.problems) == 3


def test_layout_bounds_a_part():
    assert Layout(250_000, 10**6).part_variants == 2000
    assert Layout(100, 10**6).part_variants == 20_000
    assert [Layout(10, 2500, part_variants=1000).rows(k) for k in range(3)] == [(0, 1000), (1000, 2000), (2000, 2500)]


def test_what_is_no_store_is_not_opened(tmp_path):
    from permed_compute.errors import NotFoundError

    with pytest.raises(NotFoundError):
        GenotypeStore(tmp_path / "nothing")


@pytest.mark.shared
def test_a_sample_file_in_another_order_is_refused(shared_data, tmp_path):
    source = shared_data / "omics" / "tiny1000G.bgen"
    (tmp_path / "a.bgen").symlink_to(source)
    lines = source.with_suffix(".sample").read_text().splitlines()
    (tmp_path / "a.sample").write_text("\n".join([*lines[:2], *lines[:1:-1]]) + "\n")
    assert refusal(lambda: job("omics/convert", tmp_path / "w", [str(tmp_path / "a.bgen")])) == "WRONG_SAMPLE_ORDER"
    cut = tmp_path / "b.bgen"
    cut.write_bytes(source.read_bytes()[:-5000])
    assert refusal(lambda: job("omics/convert", tmp_path / "w2", [str(cut)])) == "BGEN_TRUNCATED"
