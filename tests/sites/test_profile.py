"""Profiles are whole: every block has a source with a date, and what is wrong in one is named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.sites import profile

SITES = ("betzy", "huntcloud", "local", "lumi", "olivia", "safe", "saga", "tsd")


def test_the_sites_that_users_sit_on_ship() -> None:
    assert set(SITES) <= set(profile.shipped())


@pytest.mark.parametrize("name", SITES)
def test_every_fact_names_a_source_with_a_date(name: str) -> None:
    site = profile.load(name)
    assert site.name == name
    for where, block in site.blocks():
        cited = site.cited(block)
        assert site.sources[block.source].page in cited and "read 20" in cited, where
        assert site.is_verified(block) == ("not verified" not in cited)


@pytest.mark.parametrize("name", SITES)
def test_no_source_is_left_over(name: str) -> None:
    site = profile.load(name)
    unused = set(site.sources) - {block.source for _, block in site.blocks()}
    # a page may also be named in a note
    notes = " ".join(block.note for _, block in site.blocks())
    assert {source for source in unused if source not in notes} == set()


@pytest.mark.parametrize("name", SITES)
def test_what_is_a_default_of_ours_is_not_called_verified(name: str) -> None:
    site = profile.load(name)
    assert not site.is_verified(site.data) and not site.is_verified(site.place)


def test_the_catalogue_shows_each_with_its_title() -> None:
    folder = resources.files("permed_compute.cluster") / "sites"
    for name in SITES:
        assert (folder / f"{name}.yaml").read_text(encoding="utf-8").startswith("# ")


def shipped_text(name: str) -> str:
    return (resources.files("permed_compute.cluster") / "sites" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"max_class": "green"}}, "data.source"),
        ({"data": {"max_class": "green", "source": "nowhere"}}, "sources has no nowhere"),
        ({"data": {"max_class": "purple", "source": "ours"}}, "data.max_class"),
        ({"colour": "red"}, "colour"),
        ({"machine": {"arch": "sparc", "source": "ours"}}, "machine.arch"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(change: dict[str, object], words: str) -> None:
    text = yaml.safe_dump({**yaml.safe_load(shipped_text("saga")), **change})
    with pytest.raises(SettingsError, match=words):
        profile.parse(text)


def test_an_operators_own_file_is_read_by_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(shipped_text("saga").replace("name: saga", "name: mine"))
    assert profile.load(str(file)).name == "mine"
    with pytest.raises(NotFoundError):
        profile.load(str(tmp_path / "none.yaml"))


def test_an_unknown_site_says_what_was_meant() -> None:
    with pytest.raises(NotFoundError, match="saga"):
        profile.load("sage")
