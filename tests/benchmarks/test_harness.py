from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no installed package

from benchmarks.harness import Case, LeftOutError, measured, run


def toy(*cases: Case) -> dict:
    """The report of one benchmark with these cases, three measurements each."""
    module = SimpleNamespace(TITLE="Toy", WHY="To test.", cases=lambda quick: list(cases))
    return run({"toy": module}, repeats=3)["benchmarks"][0]


def burn(seconds: float) -> float:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 1.0


def case(name: str, measure=lambda: 1.0, **more) -> Case:
    return Case(**{"group": "g", "name": name, "unit": "1/s", "better": "higher", "measure": measure} | more)


def test_cases_of_a_group_interleave_after_a_warm_up_and_take_turns_to_begin() -> None:
    calls: list[str] = []

    def named(name: str):
        return case(name, lambda: calls.append(name) or float(len(calls)))

    [group] = toy(named("a"), named("b"))["groups"]
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    first, second = group["cases"]
    assert (first["first"], second["first"]) == (1.0, 2.0)
    assert (first["values"], first["median"], first["min"], first["max"]) == ([4.0, 5.0, 8.0], 5.0, 4.0, 8.0)
    assert first["n"] == second["n"] == 3


def test_groups_keep_their_order_and_units() -> None:
    report = toy(case("a", group="second"), case("b", group="first", unit="s", better="lower"))
    assert [(g["group"], g["unit"], g["better"]) for g in report["groups"]] == [
        ("second", "1/s", "higher"),
        ("first", "s", "lower"),
    ]


def test_interrupted_it_keeps_what_it_measured() -> None:
    left = iter(range(3))

    def measure() -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return 1.0

    module = SimpleNamespace(TITLE="Toy", WHY="", cases=lambda quick: [case("done", group="f"), case("cut", measure)])
    report = run({"toy": module, "later": module}, repeats=5)
    assert report["interrupted"]
    [benchmark] = report["benchmarks"]
    assert [row["n"] for group in benchmark["groups"] for row in group["cases"]] == [5, 2]


def test_a_case_that_breaks_and_a_peer_that_is_absent_do_not_stop_the_others() -> None:
    def breaks() -> float:
        raise ZeroDivisionError("no")

    def absent() -> float:
        raise LeftOutError("the peer is not installed")

    [group] = toy(case("good"), case("bad", breaks), case("peer", absent, peer=True))["groups"]
    good, bad, peer = group["cases"]
    assert good["n"] == 3
    assert (bad["n"], bad["error"]) == (0, "ZeroDivisionError: no")
    assert (peer["n"], peer["left_out"]) == (0, "the peer is not installed")


def test_a_module_that_breaks_is_recorded_and_what_was_opened_is_closed() -> None:
    closed: list[str] = []
    mixed = [case("a", close=lambda: closed.append("a")), case("b", unit="s")]
    report = toy(*mixed)
    assert "must share unit" in report["error"]
    assert closed == ["a"]


@pytest.mark.parametrize(
    ("ours", "better", "limit", "ratio", "met"),
    [
        (10.0, "higher", 5.0, None, True),
        (10.0, "higher", 50.0, None, False),
        (10.0, "lower", 50.0, None, True),
        (10.0, "lower", None, 1.05, False),
        (8.2, "lower", None, 1.05, True),
        (8.2, "lower", 1.0, 1.05, False),
        (8.2, "higher", None, None, None),
    ],
)
def test_goals_are_judged_on_the_median(ours, better, limit, ratio, met) -> None:
    mine = case("ours", lambda: ours, better=better, goal="a goal", limit=limit, ratio=ratio)
    [group] = toy(mine, case("peer", lambda: 8.0, better=better, peer=True))["groups"]
    assert [goal["met"] for goal in group["goals"]] == [met]


def test_a_goal_against_an_absent_peer_is_neither_met_nor_missed() -> None:
    [group] = toy(case("ours", goal="as fast as the peer", ratio=1.0))["groups"]
    assert group["goals"][0]["met"] is None


def test_cpu_of_this_process_is_counted_and_sleep_is_not() -> None:
    busy, idle = measured(lambda: burn(0.5)), measured(lambda: time.sleep(0.5) or 0.0)
    assert 0.3 <= busy.cpu_s <= 0.85  # twice would be 1.0
    assert idle.wall_s >= 0.5 and idle.cpu_s < 0.3


BURN = "import time\nwhile time.process_time() < 0.6: pass\n"


def test_cpu_of_a_child_that_ended_is_counted_once() -> None:
    reading = measured(lambda: float(subprocess.run([sys.executable, "-c", BURN], check=True).returncode))
    assert 0.3 <= reading.cpu_s <= 1.1  # twice would be 1.2


def test_cpu_of_a_child_that_lives_on_is_counted_once() -> None:
    code = "input()\n" + BURN + "print(1, flush=True)\ninput()"  # burns only when told, so within the measurement
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tell() -> float:
        child.stdin.write(b"go\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    try:
        assert 0.2 <= measured(tell).cpu_s <= 1.1  # what it took to start was used before
    finally:
        child.kill()
        child.communicate()


def test_a_daemon_that_left_the_tree_is_counted(tmp_path: Path) -> None:
    burnt = tmp_path / "burnt"
    daemon = (
        "import pathlib, time\nwhile time.process_time() < 0.8: pass\n"
        f"pathlib.Path({str(burnt)!r}).touch()\ntime.sleep(2)"
    )
    starter = (
        "import subprocess, sys\n"
        f"print(subprocess.Popen([sys.executable, '-c', {daemon!r}], start_new_session=True).pid, flush=True)"
    )

    def start() -> float:
        done = subprocess.run([sys.executable, "-c", starter], stdout=subprocess.PIPE, check=True, text=True)
        while not burnt.exists():
            time.sleep(0.02)
        return float(done.stdout)

    reading = measured(start)
    assert reading.cpu_s >= 0.4


def test_cpu_of_what_nobody_waited_for_is_counted_once() -> None:
    """Ray's raylet ignores SIGCHLD: what its workers used is in nobody's account."""
    parent = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "child = 'import time\\nwhile time.process_time() < 1.2: pass'\n"
        "started = subprocess.Popen([sys.executable, '-c', child])\n"
        "started.wait()\n"
    )
    reading = measured(lambda: float(subprocess.run([sys.executable, "-c", parent], check=True).returncode))
    assert 0.6 <= reading.cpu_s <= 2.0


def test_peak_memory_has_the_children_in_it() -> None:
    code = "import time; x = bytearray(200 << 20); time.sleep(1.5)"
    small = measured(lambda: 0.0)
    large = measured(lambda: float(subprocess.run([sys.executable, "-c", code], check=True).returncode))
    assert large.rss_mib - small.rss_mib > 100


def test_a_case_that_takes_long_warms_up_with_less_and_is_repeated_less() -> None:
    calls: list[str] = []

    def named(name: str):
        return lambda: calls.append(name) or 1.0

    [group] = toy(case("long", named("long"), warm=named("short"), repeats=1), case("b", named("b")))["groups"]
    assert (calls.count("short"), calls.count("long"), calls.count("b")) == (1, 1, 4)
    long, other = group["cases"]
    assert (long["n"], long["first"], other["n"]) == (1, None, 3)
