"""Reading `quota.yaml`: every problem at once, each with its line, what is wrong and what to write instead.

Cores and GPUs are written as such (`8`, `0.5`), memory and times with their unit (`32TiB`, `7d`), shares of a whole in
per cent (`10%`), days as dates (UTC). `diff` says in words what changes, and for whom.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from permed_compute.admission.policy import MEMORY, Account, BandRule, Member, Policy, Quota
from permed_compute.errors import Problem, SpecError
from permed_compute.spec import (
    Band,
    Purpose,
    duplicate_keys,
    format_duration,
    format_memory,
    key_lines,
    parse_duration,
    parse_memory,
)

_TOP = {
    "version", "effective", "capacity", "charges", "half_life", "entry_penalty", "idle_charge", "minimum_run_time",
    "grace", "backfill_depth", "ageing", "short_first", "drain_after", "elastic_growth", "bands", "roles", "accounts",
}  # fmt: skip
_ACCOUNT = {
    "parent", "sector", "region", "legal_entity", "funding", "quota", "members", "minimum_run_time", "effective",
}  # fmt: skip
_QUOTA = {"nominal", "lending_limit", "borrowing_limit", "weight"}
_MEMBER = {"user", "group", "role", "bands", "purposes"}
_RULE = {"reclaims", "preempts_lower", "protected", "always_preemptible"}
_DURATIONS = {
    "half_life": "half_life", "entry_penalty": "entry_penalty", "minimum_run_time": "min_runtime", "grace": "grace",
    "ageing": "ageing", "drain_after": "drain_after",
}  # fmt: skip

Path_ = tuple[str | int, ...]


def load(path: Path) -> Policy:
    """The policy in the file, sealed with its digest. Raises `SpecError` with every problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem("file", f"cannot be read ({error.__class__.__name__})")]) from None
    return loads(text, source=str(path))


def loads(text: str, *, source: str = "<text>") -> Policy:
    """The same from YAML text."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        what = f"not YAML: {getattr(error, 'problem', None) or error}"
        raise SpecError(source, [Problem("file", what, line=mark.line + 1 if mark else 0)]) from None
    if not isinstance(data, dict):
        raise SpecError(source, [Problem("file", "a quota file is a mapping of keys to values", line=1)])
    reader = _Reader(dict(key_lines(node, ())))
    reader.problems += duplicate_keys(node, ())
    policy = reader.policy(data)
    if reader.problems:
        raise SpecError(source, sorted(reader.problems, key=lambda problem: problem.line))
    return policy.sealed()


@dataclass
class _Reader:
    """Collects problems instead of stopping at the first."""

    lines: Mapping[Path_, int]
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, where: Path_, what: str, remedy: str = "") -> None:
        line = next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), 0)
        self.problems.append(Problem(".".join(map(str, where)) or "file", what, line, remedy))

    # ------------------------------------------------------------------------------------- the file

    def policy(self, data: Mapping[str, Any]) -> Policy:
        self._keys((), data, _TOP)
        capacity = {
            str(flavor): self._amount(("capacity", flavor), str(flavor), value)
            for flavor, value in self._mapping(("capacity",), data.get("capacity")).items()
        }
        values: dict[str, Any] = {"capacity": capacity}
        for name, target in _DURATIONS.items():
            if name in data:
                values[target] = self._read((name,), parse_duration, data[name])
        begin, end = self._dates(("effective",), data.get("effective"))
        values |= {"effective_from": begin, "effective_until": end}
        if "idle_charge" in data:
            values["idle_charge"] = self._read(("idle_charge",), _per_mille, data["idle_charge"])
        if "short_first" in data:
            values["short_first"] = self._read(("short_first",), _per_mille, data["short_first"])
        if "backfill_depth" in data:
            values["backfill_depth"] = self._count(("backfill_depth",), data["backfill_depth"])
        if "elastic_growth" in data:
            values["grows"] = bool(data["elastic_growth"])
        charges = self._mapping(("charges",), data.get("charges"))
        if charges:
            values["charges"] = {f: self._count(("charges", f), value) for f, value in charges.items()}
            for flavor in charges:
                self._flavor(("charges", flavor), str(flavor), capacity)
        values["rules"] = self._rules(data.get("bands"))
        roles = self._roles(data.get("roles"))
        values["accounts"] = self._accounts(data.get("accounts"), capacity, roles)
        policy = Policy(**{name: value for name, value in values.items() if value is not None})
        self._sums(policy)
        return policy

    def _rules(self, data: Any) -> Mapping[Band, BandRule]:
        rules = dict(Policy().rules)
        for name, row in self._mapping(("bands",), data).items():
            band = self._choice(("bands", name), name, Band)
            row = self._mapping(("bands", name), row)
            self._keys(("bands", name), row, _RULE)
            if band is not None:
                known = {key: bool(value) for key, value in row.items() if key in _RULE}
                rules[band] = replace(rules[band], **known)
        return rules

    def _roles(self, data: Any) -> dict[str, Member]:
        return {
            str(name): self._claims(("roles", name), self._mapping(("roles", name), row), Member())
            for name, row in self._mapping(("roles",), data).items()
        }

    def _claims(self, where: Path_, row: Mapping[str, Any], member: Member) -> Member:
        for name, kind in (("bands", Band), ("purposes", Purpose)):
            if name in row:
                listed = row[name] if isinstance(row[name], list) else [row[name]]
                found = [self._choice((*where, name), each, kind) for each in listed]
                known = tuple(each for each in found if each is not None)
                member = replace(member, bands=known) if kind is Band else replace(member, purposes=known)
        return member

    # ------------------------------------------------------------------------------------- accounts

    def _accounts(self, data: Any, capacity: Mapping[str, int], roles: Mapping[str, Member]) -> tuple[Account, ...]:
        rows = self._mapping(("accounts",), data)
        if not rows:
            self.wrong(("accounts",), "a policy without accounts divides nothing.", "List accounts.")
        accounts = [self._account(str(name), row, rows, capacity, roles) for name, row in rows.items()]
        self._cycles({account.name: account.parent for account in accounts})
        return tuple(accounts)

    def _account(
        self, name: str, data: Any, rows: Mapping[str, Any], capacity: Mapping[str, int], roles: Mapping[str, Member]
    ) -> Account:
        where: Path_ = ("accounts", name)
        row = self._mapping(where, data)
        self._keys(where, row, _ACCOUNT)
        parent = str(row.get("parent", name.rpartition("/")[0]))
        if parent and parent not in rows:
            near = difflib.get_close_matches(parent, rows, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Add it to accounts, or leave `parent` out for the top."
            self.wrong((*where, "parent") if "parent" in row else where, f"there is no account {parent!r}.", hint)
        begin, end = self._dates((*where, "effective"), row.get("effective"))
        runtime = row.get("minimum_run_time")
        facts = {key: str(row.get(key, "")) for key in ("sector", "region", "legal_entity", "funding")}
        quotas = {
            str(flavor): self._quota((*where, "quota", flavor), str(flavor), value, capacity)
            for flavor, value in self._mapping((*where, "quota"), row.get("quota")).items()
        }
        return Account(
            name, parent, quotas=quotas, members=self._members(where, row.get("members"), roles),
            min_runtime=None if runtime is None else self._read((*where, "minimum_run_time"), parse_duration, runtime),
            effective_from=begin, effective_until=end, **facts,
        )  # fmt: skip

    def _quota(self, where: Path_, flavor: str, data: Any, capacity: Mapping[str, int]) -> Quota:
        self._flavor(where, flavor, capacity)
        row = self._mapping(where, data)
        self._keys(where, row, _QUOTA)
        limits = {
            name: self._amount((*where, name), flavor, row[name])
            for name in ("nominal", "lending_limit", "borrowing_limit")
            if row.get(name) is not None
        }
        weight = row.get("weight", 1)
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 0:
            self.wrong((*where, "weight"), f"weight {weight!r} is not a whole number from 0 on.", "Write e.g. 1 or 4.")
            weight = 1
        return Quota(**limits, weight=weight)

    def _members(self, where: Path_, data: Any, roles: Mapping[str, Member]) -> tuple[Member, ...]:
        members = []
        for place, row in enumerate(data if isinstance(data, list) else []):
            here = (*where, "members", place)
            row = self._mapping(here, row)
            self._keys(here, row, _MEMBER)
            if bool(row.get("user")) == bool(row.get("group")):
                self.wrong(here, "a member is one user or one group.", "Write user: NAME or group: NAME.")
            role = str(row.get("role", ""))
            if role and role not in roles:
                near = difflib.get_close_matches(role, roles, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Roles are: {', '.join(roles) or 'none yet'}."
                self.wrong((*here, "role"), f"there is no role {role!r}.", hint)
            claims = self._claims(here, row, roles.get(role, Member()))
            members.append(replace(claims, user=str(row.get("user", "")), group=str(row.get("group", ""))))
        return tuple(members)

    def _cycles(self, parents: Mapping[str, str]) -> None:
        told: set[str] = set()
        for name in parents:
            seen = [name]
            while (above := parents.get(seen[-1], "")) and above not in seen:
                seen.append(above)
            if above == name and name not in told:
                told |= set(seen)
                self.wrong(
                    ("accounts", name, "parent"), f"stands above itself: {' → '.join([*seen, name])}.",
                    "Give one of them another parent.",
                )  # fmt: skip

    def _sums(self, policy: Policy) -> None:
        totals: dict[str, int] = {}
        last: dict[str, str] = {}
        for account in policy.accounts:
            for flavor, quota in account.quotas.items():
                totals[flavor] = totals.get(flavor, 0) + quota.nominal
                last[flavor] = account.name
                if totals[flavor] > policy.capacity.get(flavor, 1 << 60):
                    self.wrong(
                        ("accounts", account.name, "quota", flavor, "nominal"),
                        f"with this the quotas of {flavor} add up to {shown(flavor, totals[flavor])}; there are"
                        f" {shown(flavor, policy.capacity[flavor])}.",
                        f"Lower it by {shown(flavor, totals[flavor] - policy.capacity[flavor])}, or raise"
                        f" capacity.{flavor}.",
                    )  # fmt: skip

    # ------------------------------------------------------------------------------------- values

    def _keys(self, where: Path_, row: Mapping[str, Any], valid: Iterable[str]) -> None:
        for key in row:
            if key not in valid:
                near = difflib.get_close_matches(str(key), sorted(valid), n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]}?" if near else f"Valid keys here: {', '.join(sorted(valid))}."
                self.wrong((*where, key), "is not a key of a quota file.", hint)

    def _mapping(self, where: Path_, value: Any) -> Mapping[Any, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(where, f"{value!r} is not a mapping.", "Write `key: value` lines below it.")
            return {}
        return value

    def _flavor(self, where: Path_, flavor: str, capacity: Mapping[str, int]) -> None:
        if flavor not in capacity:
            near = difflib.get_close_matches(flavor, capacity, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]}?" if near else f"Flavors are: {', '.join(capacity) or 'none'}."
            self.wrong(where, f"there is no flavor {flavor!r} in capacity.", hint)

    def _amount(self, where: Path_, flavor: str, value: Any) -> int:
        if flavor == MEMORY:
            return self._read(where, parse_memory, value) or 0
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            self.wrong(where, f"{value!r} is not an amount of {flavor}.", "Write a number from 0 on, e.g. 8.")
            return 0
        return round(value * 1000)

    def _count(self, where: Path_, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.wrong(where, f"{value!r} is not a whole number from 0 on.")
            return 0
        return value

    def _read(self, where: Path_, parse: Callable[[Any], int], value: Any) -> int:
        try:
            return parse(value)
        except ValueError as error:
            self.wrong(where, f"{error}.")
            return 0

    def _choice(self, where: Path_, value: Any, kind: Any) -> Any:
        try:
            return kind(value)
        except ValueError:
            names = [each.value for each in kind]
            near = difflib.get_close_matches(str(value), names, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"One of: {', '.join(names)}."
            self.wrong(where, f"there is no {kind.__name__.lower()} {value!r}.", hint)
            return None

    def _dates(self, where: Path_, data: Any) -> tuple[int, int]:
        row = self._mapping(where, data)
        self._keys(where, row, ("from", "until"))
        begin, end = (self._date((*where, name), row.get(name)) for name in ("from", "until"))
        if begin and end and end <= begin:
            self.wrong(
                (*where, "until"), f"{row['until']} is not after {row['from']}.", "The earlier date stands at `from`."
            )
        return begin, end

    def _date(self, where: Path_, value: Any) -> int:
        if value is None:
            return 0
        if isinstance(value, datetime):
            zoned = value if value.tzinfo else value.replace(tzinfo=UTC)
            return int(zoned.timestamp() * 1000)
        if isinstance(value, date):
            return int(datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp() * 1000)
        self.wrong(where, f"{value!r} is not a date.", "Write e.g. 2026-12-01.")
        return 0


def _per_mille(value: Any) -> int:
    text = str(value).strip()
    try:
        share = round(float(text.removesuffix("%")) * 10) if text.endswith("%") else -1
    except ValueError:
        share = -1
    if not 0 <= share <= 1000:
        raise ValueError(f"{value!r} is not a share; write e.g. 10%")
    return share


# --------------------------------------------------------------------------------------------- in words


def shown(flavor: str, amount: int) -> str:
    """`8 gpu:h100`, `32TiB memory`."""
    return f"{format_memory(amount)} memory" if flavor == MEMORY else f"{amount / 1000:g} {flavor}"


def diff(old: Policy, new: Policy) -> list[str]:
    """What changes for whom, a sentence each; empty where nothing does."""
    before = {account.name: account for account in old.accounts}
    after = {account.name: account for account in new.accounts}
    said = [f"{name}: the account is closed; nothing of it starts any more." for name in before if name not in after]
    for name, account in after.items():
        said += _account_diff(before.get(name), account)
    for name, target in _DURATIONS.items():
        was, now = getattr(old, target), getattr(new, target)
        if was != now:
            said.append(f"everybody: {name.replace('_', ' ')} {format_duration(was)} → {format_duration(now)}.")
    for name in ("idle_charge", "short_first"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            said.append(f"everybody: {name.replace('_', ' ')} {was / 10:g}% → {now / 10:g}%.")
    if old.backfill_depth != new.backfill_depth:
        said.append(f"everybody: backfill depth {old.backfill_depth} → {new.backfill_depth}.")
    if old.grows != new.grows:
        said.append(f"everybody: running elastic jobs {'grow' if new.grows else 'no longer grow'}.")
    for band, rule in new.rules.items():
        for what in sorted(_RULE):
            if getattr(rule, what) != getattr(old.rules[band], what):
                verb = "now" if getattr(rule, what) else "no longer"
                said.append(f"band {band.value}: {verb} {what.replace('_', ' ')}.")
    return said


def _account_diff(was: Account | None, now: Account) -> Iterator[str]:
    if was is None:
        quotas = (
            ", ".join(shown(flavor, quota.nominal) for flavor, quota in now.quotas.items()) or "no quota of its own"
        )
        yield f"{now.name}: a new account with {quotas}."
        return
    for flavor in dict.fromkeys([*was.quotas, *now.quotas]):
        yield from _quota_diff(now.name, flavor, was.quotas.get(flavor, Quota()), now.quotas.get(flavor, Quota()))
    if was.parent != now.parent:
        yield f"{now.name}: stands below {now.parent or 'the top'} instead of {was.parent or 'the top'}."
    if (was.effective_from, was.effective_until) != (now.effective_from, now.effective_until):
        yield f"{now.name}: other dates."
    names = {_who(m): m for m in was.members}
    for member in now.members:
        if _who(member) not in names:
            bands = ", ".join(band.value for band in member.bands)
            yield f"{now.name}: {_who(member)} may now submit ({bands})."
        elif names[_who(member)] != member:
            yield f"{now.name}: {_who(member)} may now claim {', '.join(b.value for b in member.bands)}."
    for who in names.keys() - {_who(member) for member in now.members}:
        yield f"{now.name}: {who} may no longer submit."


def _quota_diff(name: str, flavor: str, was: Quota, now: Quota) -> Iterator[str]:
    if was.nominal != now.nominal:
        more = now.nominal - was.nominal
        effect = "guaranteed more" if more > 0 else "guaranteed less"
        yield (
            f"{name}: {effect}: {shown(flavor, was.nominal)} → {shown(flavor, now.nominal)}"
            + ("" if more > 0 else "; what it uses above stops borrowing, and is drained after the stated delay") + "."
        )  # fmt: skip
    for what, words in (("lending_limit", "lends at most"), ("borrowing_limit", "borrows at most")):
        old, new = getattr(was, what), getattr(now, what)
        if old != new:
            yield f"{name}: {words} {_limit(flavor, old)} → {_limit(flavor, new)}."
    if was.weight != now.weight:
        yield f"{name}: weight for {flavor} {was.weight} → {now.weight}."


def _limit(flavor: str, amount: int | None) -> str:
    return "without limit" if amount is None else shown(flavor, amount)


def _who(member: Member) -> str:
    return member.user or f"group {member.group}"
