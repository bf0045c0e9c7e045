from __future__ import annotations

from pathlib import Path

import pytest

from permed_compute.errors import SettingsError
from permed_compute.settings import resolve


def test_each_layer_wins_over_the_one_below_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("grace: 11\nheartbeat: 12\nlease: 13\n")
    env = {"PERMED_HOME": str(tmp_path), "PERMED_HEARTBEAT": "22", "PERMED_LEASE": "23"}
    settings = resolve({"lease": 33, "cpus": None}, env)
    assert (settings.grace, settings.heartbeat, settings.lease) == (11, 22, 33)
    source = {name: where for name, _, where, _ in settings.rows()}
    assert source["grace"] == "settings.yaml in the home" and source["heartbeat"] == "environment PERMED_HEARTBEAT"
    assert source["lease"] == "flag" and source["cpus"] == "default" and source["executor"] == "preset cpu"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"grce": 1}, "Did you mean grace"),
        ({"grace": "long"}, "not int"),
        ({"grace": -1}, "below zero"),
        ({"executor": "spark"}, "ray or inprocess"),
        ({"preset": "nonsense"}, "no preset"),
        ({"site": "nonsense"}, "no site"),
    ],
)
def test_impossible_settings_are_named(flags: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve({"home": str(tmp_path), **flags}, {})


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    settings = resolve({"home": str(tmp_path), "queue_url": "postgresql+psycopg://kari:hemmelig@db/permed"}, {})
    shown = {name: value for name, value, _, _ in settings.rows()}
    assert shown["queue_url"] == "postgresql+psycopg://kari:***@db/permed" and "hemmelig" in settings.queue_url
