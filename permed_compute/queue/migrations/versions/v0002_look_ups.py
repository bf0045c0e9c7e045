"""Indexes for what is asked all the time: the jobs of some states, the events of one job."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("queue_jobs_state", "queue_jobs", ["state"])
    op.create_index("queue_events_job", "queue_events", ["job_id"])


def downgrade() -> None:
    raise NotImplementedError("A queue is restored from its backup, not downgraded.")
