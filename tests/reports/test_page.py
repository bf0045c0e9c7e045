from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from permed_compute.reports.page import render_job_page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

MANIFEST: dict[str, Any] = {
    "job": {
        "id": "01jobid", "name": "brain-extraction", "attempt": 2, "state": "RUNNING", "account": "local",
        "band": "research", "purpose": "research", "data_class": "red",
    },
    "workload": {"name": "radiology/brain-extraction", "version": "3", "model_digest": "ab" * 32},
    "spec": {
        "name": "brain-extraction",
        "inputs": [{"path": "/data/Kari Nordmann/t1", "name": "input"}],
        "code": "/home/kari/code",
        "params": {"threshold": 0.5, "atlas": "~/Kari/atlas.nii"},
    },
    "code": {"version": "0.1.0", "commit": "702f1d9", "dirty": True},
    "packages": {"torch": "2.13.0"},
    "machine": {"platform": "Linux", "python": "3.11.2", "cpus": 2, "memory_mib": 15998},
    "devices": [
        {"worker": 0, "flavor": "cpu", "node": "kari-laptop", "devices": []},
        {"worker": 1, "flavor": "h100", "node": "kari-laptop", "devices": [0]},
        {"worker": 2, "flavor": "h100", "node": "kari-laptop", "devices": [3]},
    ],
    "why": "CPU: the job asks for no GPU.",
    "engine": {"name": "ray", "version": "2.60.0"},
    "policy": "fifo-1",
    "seed": 7,
    "inputs": [{"name": "input", "digest": "cd" * 32, "files": 192}],
    "stages": {"read": 3.0, "infer": 21.0},
    "usage": {"wall_s": 27.0, "cpu_s": 54.0, "rss_peak_mib": 2048},
    "started_at": 1_795_000_000_000,
    "ended_at": 1_795_000_027_000,
}  # fmt: skip

RESULT: dict[str, Any] = {
    "outcome": "PARTIAL",
    "values": {"volumes_ml": {"brain": 1403.27}, "parts": {"series-1": {"brain_ml": 1403.27}}},
    "metrics": {"dice": 0.9962},
    "figures": [["overlay.png", "Brain mask on the T1 series"]],
    "findings": [],
    "parts": [
        {
            "name": "series-1", "state": "DONE", "key": "k", "seconds": 24.1, "values": {"brain_ml": 1403.27},
            "findings": [
                {"code": "DUPLICATES", "sentence": "3 slices stood twice.", "severity": "corrected", "about": "9" * 64,
                 "numbers": {"duplicates": 3}}
            ],
            "files": ["parts/series-1/mask æ #1.nii.gz"],
        },
        {
            "name": "series-2", "state": "REFUSED", "seconds": 0.3, "values": {}, "reason": "GANTRY_TILT: tilted",
            "findings": [
                {"code": "GANTRY_TILT", "sentence": "The slices are sheared.", "severity": "refused",
                 "about": "8" * 64, "numbers": {"tilt_deg": 12.5}}
            ],
            "files": [],
        },
        {"name": "series-3", "state": "FAILED", "values": {}, "reason": "Its worker <ended> twice."},
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    (folder / "parts" / "series-1").mkdir(parents=True)
    (folder / "parts" / "series-1" / "mask æ #1.nii.gz").write_bytes(b"mask")
    (folder / "overlay.png").write_bytes(PNG)
    (folder / "brain.dcm").write_bytes(b"dicom")
    write(folder, MANIFEST, RESULT)
    return folder


def write(folder: Path, manifest: Any, result: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps(result))


class Page(HTMLParser):
    """What a reader meets: text, addresses, and elements left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(self.raw)
        self.text = " ".join(" ".join(self.words).replace("\u202f", " ").replace("\xa0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


def test_everything_a_reader_needs_is_on_it(results: Path) -> None:
    path = render_job_page(results)
    assert path == results / "index.html"
    page = Page(path)
    assert page.open == [], "every element is closed"
    for words in (
        "RESEARCH – not for clinical use",
        "brain-extraction PARTIAL",
        "radiology/brain-extraction 3",
        "took 27.0 s",
        "Volumes: brain 1 403.3 ml",
        "Dice 0.9962",
        "infer 21.0 s · 88 %",
        "1 worker on CPU; 2 workers on h100 (GPU 0, GPU 3)",
        "CPU: the job asks for no GPU.",
        "54.0 s – 2.0 cores busy",
        "2.0 GiB",
        "2 of 3 parts gave no result",
        "The slices are sheared. GANTRY_TILT · Tilt 12.5 °",
        "Its worker <ended> twice.",
        "3 slices stood twice. DUPLICATES · Duplicates 3",
        "permed resume 01jobid",
        "702f1d9",
        "ab" * 32,
        "torch 2.13.0",
    ):
        assert words in page.text, words


def test_it_loads_nothing_from_elsewhere_and_runs_nothing(results: Path) -> None:
    page = Page(render_job_page(results))
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "form"})
    assert not re.search(r"(?:https?:)?//[a-z]", page.raw.replace("file:", ""))
    assert "@import" not in page.raw and "url(" not in page.raw


def test_links_lead_to_files_of_the_folder(results: Path) -> None:
    page = Page(render_job_page(results))
    links = [link for link in page.links if not link.startswith("#")]
    assert "parts/series-1/mask%20%C3%A6%20%231.nii.gz" in links
    assert {"brain.dcm", "overlay.png", "manifest.json", "result.json"} <= set(links)
    assert "index.html" not in links
    for link in links:
        assert (results / unquote(link)).is_file()


def test_small_pictures_travel_inside_and_large_ones_are_linked(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [inside] = Page(render_job_page(results)).images
    assert inside["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert inside["alt"] == "Brain mask on the T1 series"
    monkeypatch.setattr("permed_compute.reports.page._EMBED_BYTES", 10)
    [linked] = Page(render_job_page(results)).images
    assert linked["src"] == "overlay.png"


def test_no_path_of_the_machine_and_no_name_from_one_is_on_it(results: Path, tmp_path: Path) -> None:
    page = Page(render_job_page(results))
    assert "kari" not in page.raw.lower() and str(tmp_path) not in page.raw
    assert "(a path)" in page.text and "threshold" in page.text


def test_what_a_workload_writes_is_text_never_markup(results: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x>"
    write(
        results,
        {"job": {"name": evil, "id": evil}, "why": evil, "stages": {evil: 1.0}, "packages": {evil: evil}},
        {
            "values": {evil: 1},
            "figures": [["overlay.png", evil]],
            "parts": [{"name": evil, "state": evil, "reason": evil, "values": {evil: evil}}],
            "findings": [{"code": evil, "sentence": evil, "numbers": {evil: evil}}],
        },
    )
    page = Page(render_job_page(results))
    assert page.tags.isdisjoint({"script"})
    assert len(page.images) == 1
    assert page.images[0]["alt"] == evil


def test_files_outside_the_folder_are_never_taken_in(results: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    (results / "link.png").symlink_to(tmp_path / "secret.png")
    figures = [["../secret.png", "a"], [str(tmp_path / "secret.png"), "b"], ["link.png", "c"], ["gone.png", "d"]]
    parts = [{"name": "p", "state": "DONE", "files": ["../secret.png", "link.png"]}]
    write(results, MANIFEST, RESULT | {"figures": figures, "parts": parts})
    page = Page(render_job_page(results))
    assert page.images == []
    assert not [link for link in page.links if "secret" in link or "link.png" in link]


def test_only_care_has_no_banner(results: Path) -> None:
    care = MANIFEST | {"job": MANIFEST["job"] | {"purpose": "care"}}
    write(results, care, RESULT)
    assert "not for clinical use" not in Page(render_job_page(results)).text
    write(results, care | {"job": MANIFEST["job"] | {"purpose": "quality"}}, RESULT)
    assert "not for clinical use" in Page(render_job_page(results)).text


def test_one_part_lends_its_values_to_a_job_that_has_none(results: Path) -> None:
    only = [{"name": "p", "state": "DONE", "values": {"brain_ml": 10.0}}]
    write(results, MANIFEST, {"outcome": "SUCCEEDED", "values": {}, "metrics": {}, "parts": only})
    assert "Brain 10 ml" in Page(render_job_page(results)).text


def test_ten_thousand_parts_still_make_a_page_for_a_phone(results: Path) -> None:
    parts = [{"name": f"part-{i}", "state": "DONE", "seconds": 1.0} for i in range(10_000)]
    parts[9_999]["state"] = "FAILED"
    write(results, MANIFEST, RESULT | {"parts": parts})
    page = Page(render_job_page(results))
    assert len(page.raw) < 200_000
    assert "part-9999" in page.text, "what failed stands first"
    assert "The first 200 of 10000" in page.text


@pytest.mark.parametrize("missing", sorted(MANIFEST))
def test_any_key_of_the_manifest_may_be_missing(results: Path, missing: str) -> None:
    write(results, {key: value for key, value in MANIFEST.items() if key != missing}, RESULT)
    assert Page(render_job_page(results)).open == []


@pytest.mark.parametrize("missing", sorted(RESULT))
def test_any_key_of_the_result_may_be_missing(results: Path, missing: str) -> None:
    write(results, MANIFEST, {key: value for key, value in RESULT.items() if key != missing})
    assert Page(render_job_page(results)).open == []


def test_an_empty_folder_makes_a_page_too(tmp_path: Path) -> None:
    page = Page(render_job_page(tmp_path))
    assert page.open == [] and "UNKNOWN" in page.text
