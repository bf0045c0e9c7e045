"""Real Slurm takes every golden file, and bills what we say it bills, on a Slurm with the sites' partitions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.sites import cost, profile
from permed_compute.sites.profile import Partition, Per
from permed_compute.testing.slurm import SlurmCluster, SlurmNode, possible
from tests.sites.cases import CASES, Case

pytestmark = pytest.mark.skipif(not possible(), reason="Slurm is not on this machine (make real-parts)")


def declared(accounting: bool = False) -> SlurmCluster:
    """Nodes of every kind that the golden files need, and the sites' partitions, by name and as `site-partition`."""
    nodes: list[SlurmNode] = []
    lines: list[str] = []
    plain: dict[str, list[str]] = {}
    kinds: dict[tuple[int, int, int], list[str]] = {}
    for site, name in dict.fromkeys((case.site, case.request.partition) for case in CASES if case.request.partition):
        facts = profile.load(site).partitions[name]
        most = max(case.request.nodes for case in CASES if (case.site, case.request.partition) == (site, name))
        shape = (64, 256 * 1024, 4)  # where no page says what the nodes are
        if facts.nodes:
            kind = facts.nodes[0]
            shape = (kind.cpus, int((kind.memory_gib or 0) * 1024), kind.gpus)
        own = kinds.setdefault(shape, [])
        while len(own) < most:
            nodes.append(SlurmNode(f"n{len(nodes)}", *shape))
            own.append(nodes[-1].name)
        plain.setdefault(name, []).extend(own)
        lines.append(f"PartitionName={site}-{name} Nodes={','.join(own)}{_weights(facts, accounting)}")
    lines += [f"PartitionName={name} Nodes={','.join(dict.fromkeys(own))}" for name, own in plain.items()]
    lines += ["AccountingStorageTRES=gres/gpu"] if accounting else []
    return SlurmCluster(nodes, accounting=accounting, lines=lines)


def _weights(facts: Partition, accounting: bool) -> str:
    """The page's factors as Slurm's, where they are plain: whole nodes are billed by their cores."""
    charge = facts.charge
    if charge is None or any(isinstance(value, Per) for value in charge.factors.values()):
        return ""
    if facts.whole_node:
        return f" TRESBillingWeights=CPU={float(charge.factors['node']) / facts.nodes[0].cpus}"  # type: ignore[arg-type]
    names = {"cpu": "CPU={}", "memory_gib": "Mem={}G", "gpu": "GRES/gpu={}"}
    said = [names[key].format(value) for key, value in charge.factors.items() if key != "gpu" or accounting]
    return f" TRESBillingWeights={','.join(said)}"


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with declared() as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_sbatch_accepts(case: Case, slurm: SlurmCluster) -> None:
    """What only an accounting database knows (QOS) is left out where there is none."""
    words = ["sbatch", "--test-only", *(["--qos=normal"] if case.request.qos else []), str(case.path)]
    with slurm.inside():
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert f"using {case.request.nodes * case.request.cpus} processors" in done.stderr


PLAIN = [
    case for case in CASES
    if case.billing and case.site != "lumi" and not case.request.gpus
]  # fmt: skip


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_slurm_bills_what_we_say(case: Case, slurm: SlurmCluster, tmp_path: Path) -> None:
    words = ["sbatch", "--parsable", "--hold", "--qos=normal", f"--partition={case.site}-{case.request.partition}",
             f"--output={tmp_path}/log", str(case.path)]  # fmt: skip
    number = slurm.run(*words).strip()
    try:
        billed = re.search(r"billing=(\d+)", slurm.run("scontrol", "show", "job", number))
        assert billed is not None and int(billed[1]) == case.billing == cost.of(case.request).rate.units
    finally:
        slurm.run("scancel", number)


BILLED = [case for case in CASES if case.billing is not None and case.site != "lumi"]


@pytest.mark.soak
@pytest.mark.skipif(not possible(accounting=True), reason="slurmdbd and MariaDB are not on this machine")
def test_with_accounting_slurm_bills_gpus_and_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs are billed by, and limits known to, a Slurm with an accounting database only."""
    with declared(accounting=True) as slurm, slurm.inside():
        slurm.run("sacctmgr", "--immediate", "add", "account", "nn9999k")
        slurm.run("sacctmgr", "--immediate", "add", "user", "root", "account=nn9999k")
        slurm.run("sacctmgr", "--immediate", "modify", "account", "nn9999k", "set", "GrpTRESMins=billing=60000")
        wrong = {}
        for case in BILLED:
            words = [
                "sbatch", "--parsable", "--hold", "--qos=normal",
                f"--partition={case.site}-{case.request.partition}", f"--output={tmp_path}/log", str(case.path),
            ]  # fmt: skip
            number = slurm.run(*words).strip()
            said = re.search(r"billing=(\d+)", slurm.run("scontrol", "show", "job", number))
            billed = int(said[1]) if said else 0
            slurm.run("scancel", number)
            if billed != case.billing:
                wrong[case.id] = (billed, case.billing)
        assert wrong == {}
        assert cost.left(BILLED[0].request) == 1000.0
