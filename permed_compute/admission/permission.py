"""Who may claim which account, band and purpose: members of the account or of one above it, as the policy lists them.

Identity comes from the operating system (the socket's peer, or the user of this process), never from the job.
"""

from __future__ import annotations

from collections.abc import Iterable

from permed_compute.admission.policy import Member, Policy
from permed_compute.admission.quota import in_force
from permed_compute.errors import PermissionDeniedError
from permed_compute.spec import JobSpec


def check(policy: Policy, spec: JobSpec, user: str, groups: Iterable[str], now: int) -> None:
    """Raise `PermissionDeniedError` where the policy does not let this user submit this job.

    Without accounts in the policy everybody may use every account: quotas are what divides a pool.
    """
    if not policy.accounts:
        return
    path = policy.path(spec.account)
    mine = set(groups)
    if not path:
        yours = sorted(account.name for account in policy.accounts if memberships(policy, account.name, user, mine))
        raise PermissionDeniedError(
            f"There is no account {spec.account!r}.",
            remedy=f"Yours: {', '.join(yours)}." if yours else "You are a member of none: ask the pool's operator.",
        )
    found = memberships(policy, spec.account, user, mine)
    if not found:
        raise PermissionDeniedError(
            f"{user} is not a member of account {spec.account}.", remedy="Ask who administers the account to add you."
        )
    closed = next((account for account in path if not in_force(account, now)), None)
    if closed is not None:
        raise PermissionDeniedError(
            f"Account {closed.name} is not in force today.", remedy="`permed quota` shows its dates."
        )
    bands = {band for member in found for band in member.bands}
    purposes = {purpose for member in found if spec.band in member.bands for purpose in member.purposes}
    if spec.band not in bands:
        raise PermissionDeniedError(
            f"{user} may not submit to band {spec.band.value} for account {spec.account}.",
            remedy=f"Bands open to you there: {', '.join(sorted(bands))}.",
        )
    if spec.purpose not in purposes:
        raise PermissionDeniedError(
            f"{user} may not claim purpose {spec.purpose.value} in band {spec.band.value} for account {spec.account}.",
            remedy=f"Purposes open to you there: {', '.join(sorted(purposes))}.",
        )


def memberships(policy: Policy, account: str, user: str, groups: Iterable[str]) -> list[Member]:
    """The entries, of the account and those above it, that name this user or one of their groups."""
    mine = set(groups)
    return [
        member
        for each in policy.path(account)
        for member in each.members
        if (member.user and member.user == user) or (member.group and member.group in mine)
    ]
