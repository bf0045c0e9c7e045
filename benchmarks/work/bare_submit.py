"""Submits a job by Ray's client, prints when it did, and waits for its end: python bare_submit.py URL COMMAND."""

from __future__ import annotations

import sys
import time

from ray.job_submission import JobSubmissionClient

if __name__ == "__main__":
    client = JobSubmissionClient(sys.argv[1])
    began = time.time()
    job = client.submit_job(entrypoint=sys.argv[2])
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(repr(began))
