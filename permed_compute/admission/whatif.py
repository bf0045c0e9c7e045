"""A policy with a few figures changed, as an admin asks: `helse/nord.gpu:nominal+=8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from permed_compute.admission.policy import CPU, MEMORY, Account, Policy, Quota
from permed_compute.errors import Problem, SpecError

_CHANGE = re.compile(
    r"(?P<account>[^.\s]+)\.(?P<flavor>[a-z0-9][a-z0-9:-]*?):(?P<field>nominal|lending_limit|borrowing_limit|weight)"
    r"\s*(?P<sign>\+=|-=|=)\s*(?P<amount>\d+)"
)


def changed(policy: Policy, changes: Sequence[str]) -> Policy:
    """The policy after `ACCOUNT.FLAVOR:FIELD+=N` (or `-=`, `=`), in whole devices or cores (MiB for memory).

    `gpu` means every GPU flavor that the account has a quota of. A limit that is not set counts as the account's
    nominal. Raises `SpecError` with everything that is wrong.
    """
    accounts = {account.name: account for account in policy.accounts}
    problems: list[Problem] = []
    for text in changes:
        match = _CHANGE.fullmatch(text.strip())
        if match is None:
            problems.append(Problem(text, "is no change", remedy="Write e.g. helse/nord.gpu:nominal+=8."))
            continue
        account = accounts.get(match["account"])
        if account is None:
            known = ", ".join(sorted(accounts)) or "none: this policy has no accounts"
            problems.append(Problem(text, "names no account", remedy=f"Accounts: {known}."))
            continue
        flavors = [name for name in account.quotas if name == match["flavor"] or name.startswith(f"{match['flavor']}:")]
        if not flavors:
            known = ", ".join(sorted(account.quotas)) or "none"
            problems.append(Problem(text, "names no flavor of that account", remedy=f"It has: {known}."))
            continue
        for flavor in flavors:
            account = _with(account, flavor, match["field"], match["sign"], int(match["amount"]))
        accounts[account.name] = account
    if problems:
        raise SpecError("--set", problems)
    return replace(policy, accounts=tuple(accounts[account.name] for account in policy.accounts)).sealed()


def _with(account: Account, flavor: str, field: str, sign: str, amount: int) -> Account:
    quota = account.quotas[flavor]
    scale = 1 if field == "weight" or flavor == MEMORY else 1000
    before = getattr(quota, field)
    before = quota.nominal if before is None else before
    after = amount * scale if sign == "=" else before + (amount if sign == "+=" else -amount) * scale
    new: Quota = replace(quota, **{field: max(0, after)})
    return replace(account, quotas={**account.quotas, flavor: new})


def promised(policy: Policy, capacity: int) -> str:
    """A sentence where the floors of all GPU flavors add up to more than there is (thousandths), else ''."""
    total = sum(
        quota.nominal for account in policy.accounts for flavor, quota in account.quotas.items()
        if flavor not in (CPU, MEMORY)
    )  # fmt: skip
    if total <= capacity:
        return ""
    return f"The floors add up to {total // 1000} GPUs, and there are {capacity // 1000}: not all can be kept at once."
