"""Settings: defaults < preset < site < home file < environment < flags; each value remembers where it came from.

What a site says (its `settings:`, and that its jobs go through Slurm) counts as much as whoever named the site does:
`--site saga` is above a PERMED_EXECUTOR that happens to be set, and `--executor` beside it above both.

A preset is `configs/<name>.yaml`; a site is the `settings:` section of `cluster/sites/<name>.yaml`; the home file is
`PERMED_HOME/settings.yaml`; an environment variable is `PERMED_` + the field's name in capitals.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.paths import HomePaths


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class Settings:
    """Frozen; `source[name]` says where each value came from. Memory in MiB, times in seconds."""

    home: str = _setting("", "folder of everything durable; default ~/.permed")
    preset: str = _setting("cpu", "defaults to start from: a name in configs/")
    site: str = _setting("", "site profile: a name in cluster/sites/")
    site_account: str = _setting("", "who pays at the site, e.g. nn9999k; default the last part of the job's account")
    site_partition: str = _setting("", "partition of the site; default the first that has what a job needs")
    site_qos: str = _setting("", "quality of service of the site, e.g. devel")
    site_image: str = _setting("", "container image at the site that jobs run in")
    site_options: str = _setting("", "further options of the site's scheduler, e.g. --reservation=course")
    site_stage_in: str = _setting("", "FROM:TO …: what the site's scheduler copies in before a job (#STAGE)")
    site_stage_out: str = _setting("", "FROM:TO …: what the site's scheduler copies out after a job (#STAGE)")
    site_python: str = _setting("", "Python on the site's compute nodes; default: the one that submits")
    queue_url: str = _setting("", "SQLAlchemy URL, e.g. postgresql+psycopg://…; default SQLite in the home")
    anchor: str = _setting("", "folder outside the home for the audit key and anchor; default ~/.local/state/permed")
    executor: str = _setting("ray", "ray, inprocess, or slurm (what a site run by Slurm makes of it)")
    cpus: float = _setting(0.0, "CPU cores to offer to jobs; 0 = all that this process may use")
    memory: int = _setting(0, "MiB to offer to jobs; 0 = 80 % of what the machine has")
    gpus: str = _setting("auto", "auto, or none to hide GPUs from jobs")
    ray_address: str = _setting("", "an existing Ray (host:port); default: start one on loopback")
    tracking_uri: str = _setting("", "MLflow server or store; default SQLite in the home; `none` switches it off")
    grace: int = _setting(30, "seconds between asking an attempt to stop and ending it")
    heartbeat: int = _setting(30, "seconds without a sign of life before the engine is asked about an attempt")
    lease: int = _setting(60, "seconds after which another controller may take over a silent one's queue")
    source: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def paths(self) -> HomePaths:
        return HomePaths(Path(self.home))

    def rows(self) -> Iterator[tuple[str, Any, str, str]]:
        """(name, value, where it came from, what it means) for `permed doctor`."""
        for item in _FIELDS.values():
            value = _hide_password(getattr(self, item.name))
            yield item.name, value, self.source.get(item.name, "default"), item.metadata["help"]


_FIELDS = {item.name: item for item in fields(Settings) if item.name != "source"}


def resolve(flags: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Settings:
    """The settings in force. `flags` wins over everything; None values in it count as not given.

    Raises `SettingsError` for an unknown name or an impossible value, with where it stood.
    """
    env = os.environ if env is None else env
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    from_env = {name: env[f"PERMED_{name.upper()}"] for name in _FIELDS if f"PERMED_{name.upper()}" in env}
    home = Path(given.get("home") or from_env.get("home") or Path.home() / ".permed").expanduser().absolute()
    from_home = _read(home / "settings.yaml")
    named = {
        name: layer[name] for layer in (from_home, from_env, given) for name in ("preset", "site") if name in layer
    }
    of_site = site(named["site"]) if named.get("site") else {}
    base = named.get("preset") or of_site.get("preset") or "cpu"
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"preset {base}", preset(base)),
        ("settings.yaml in the home", from_home),
        ("environment", from_env),
        ("flag", given),
    ]
    where_named = max((place for place, (_, layer) in enumerate(layers) if layer.get("site")), default=1)
    layers.insert(where_named, (f"site {named.get('site', '')}", of_site))
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    for where, layer in layers:
        for name, value in layer.items():
            values[name] = _converted(name, value, where)
            source[name] = where if where != "environment" else f"environment PERMED_{name.upper()}"
    state = env.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    values["home"] = str(home)
    values.setdefault("anchor", str(Path(state) / "permed"))
    return Settings(**values, source=source)


def home_file(home: HomePaths) -> Mapping[str, Any]:
    """What the home's own settings.yaml says, {} where there is none."""
    return _read(home.settings)


def preset(name: str) -> Mapping[str, Any]:
    """The settings of `configs/<name>.yaml`."""
    return _shipped("permed_compute.configs", f"{name}.yaml", "preset")


def site(name: str) -> Mapping[str, Any]:
    """The `settings:` section of a site's profile, and the executor that its scheduler means."""
    from permed_compute.sites.profile import load

    try:
        found = load(name)
        slurm = {"executor": "slurm"} if found.scheduler.kind == "slurm" else {}
        return {**slurm, **found.settings}
    except NotFoundError as error:
        raise SettingsError(error.message, remedy=error.remedy) from None


def _shipped(package: str, file: str, kind: str) -> Mapping[str, Any]:
    import yaml

    entry = resources.files(package).joinpath(file)
    if not entry.is_file():
        raise SettingsError(f"There is no {kind} {Path(file).stem!r}.", remedy=f"`permed catalog` lists the {kind}s.")
    return yaml.safe_load(entry.read_text(encoding="utf-8")) or {}


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read ({error.__class__.__name__}).") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path} is not a mapping of settings.")
    return data


def _converted(name: str, value: Any, where: str) -> Any:
    if name not in _FIELDS:
        near = difflib.get_close_matches(name, _FIELDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Settings are: {', '.join(_FIELDS)}."
        raise SettingsError(f"There is no setting {name!r} ({where}).", remedy=hint)
    kind: Any = type(_FIELDS[name].default)
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        raise SettingsError(f"{name} ({where}) is {value!r}, which is not {kind.__name__}.") from None
    if kind in (int, float) and converted < 0:
        raise SettingsError(f"{name} ({where}) is {value!r}, below zero.")
    if name == "executor" and converted not in ("ray", "inprocess", "slurm"):
        raise SettingsError(f"executor ({where}) is {value!r}.", remedy="Write slurm, ray or inprocess.")
    if name == "site" and "/" in converted:
        return str(Path(converted).expanduser().absolute())
    return converted


def _hide_password(value: Any) -> Any:
    if isinstance(value, str) and "://" in value and "@" in value:
        scheme, rest = value.split("://", 1)
        user = rest.split("@", 1)[0].split(":", 1)[0]
        return f"{scheme}://{user}:***@{rest.split('@', 1)[1]}"
    return value
