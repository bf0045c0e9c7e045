"""One task on bare Ray that says when it started: python bare_task.py FILE [cold].

On the cluster that the environment names, or, cold, on one that it starts.
"""

from __future__ import annotations

import sys

import ray
from burn import stamp

if __name__ == "__main__":
    if sys.argv[2:] == ["cold"]:
        ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    else:
        ray.init(log_to_driver=False)
    ray.get(ray.remote(num_cpus=1)(stamp).remote(sys.argv[1]))
