"""Nobody may claim an account, a band or a purpose that is not theirs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from permed_compute.admission.permission import check
from permed_compute.admission.policy import Account, Member, Policy
from permed_compute.admission.snapshot import Node
from permed_compute.errors import PermissionDeniedError, SpecError
from permed_compute.queue.memory import MemoryQueue
from permed_compute.service import Caller, JobService, handle
from permed_compute.spec import Band, JobSpec, Purpose

POLICY = Policy(
    accounts=(
        Account("helse", members=(Member(group="radiologi", bands=(Band.CLINICAL,), purposes=(Purpose.CARE,)),)),
        Account("helse/nord", parent="helse", members=(Member(user="kari"),)),
        Account("closed", members=(Member(user="kari"),), effective_until=5),
    )
).sealed()


def spec(account: str, **changes: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "j", "workload": "m:f", "account": account, **changes})


def test_members_of_an_account_and_of_those_above() -> None:
    check(POLICY, spec("helse/nord"), "kari", (), 10)
    check(POLICY, spec("helse/nord", band="clinical", purpose="care"), "ola", ("radiologi",), 10)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (spec("helse"), "not a member"),
        (spec("helse/nrd"), "Yours: closed, helse/nord."),
        (spec("closed"), "not in force"),
        (spec("helse/nord", band="clinical"), "Bands open to you there: opportunistic, research."),
        (spec("helse/nord", purpose="care"), "Purposes open to you there: research."),
    ],
)
def test_refused_with_what_is_open(asked: JobSpec, says: str) -> None:
    with pytest.raises(PermissionDeniedError) as refused:
        check(POLICY, asked, "kari", (), 10)
    assert says in str(refused.value)


def test_without_a_policy_everybody_may_use_local_and_with_one_the_service_refuses() -> None:
    queue = MemoryQueue()
    service = JobService(queue, Caller("kari", operator=False), lambda: (Node("n", 1000, 1024),))
    service.submit([spec("local")])
    with pytest.raises(PermissionDeniedError):
        service.admin("policy", {"policy": POLICY.row()})
    operator = JobService(queue, Caller("root", operator=True), lambda: ())
    operator.admin("policy", {"policy": POLICY.row()})
    with pytest.raises(PermissionDeniedError):
        service.submit([spec("local")])
    service.submit([spec("helse/nord")])
    assert [event.reason for event in queue.events() if event.action == "NOTED"] == ["policy"]


def test_a_preview_goes_by_the_policy_in_force_and_writes_nothing() -> None:
    queue = MemoryQueue()
    nodes = (Node("n", 4000, 4096),)
    service = JobService(queue, Caller("kari", operator=False), lambda: nodes)
    assert service.preview(spec("local"))["starts_now"]
    JobService(queue, Caller("root", operator=True), lambda: nodes).admin("policy", {"policy": POLICY.row()})
    before = queue.head()
    with pytest.raises(PermissionDeniedError):
        service.preview(spec("local"))
    told = service.preview(spec("helse/nord"))
    assert told["starts_now"] and [grant["node"] for grant in told["grants"]] == ["n"]
    assert queue.head() == before and queue.jobs() == []


def test_a_preview_comes_through_the_socket_as_it_is() -> None:
    service = JobService(MemoryQueue(), Caller("kari", operator=False), lambda: (Node("n", 4000, 4096),))
    asked = spec("local")
    answer = handle(lambda caller: service, None, "preview", {"spec": asked.canonical()})
    assert json.loads(json.dumps(answer)) == service.preview(asked)
    with pytest.raises(SpecError):
        handle(lambda caller: service, None, "preview", {"spec": "{}"})
