"""`ray start` without the rest of Ray's command line, whose import costs as much as the start itself.

Those of Serve, jobs and states bring FastAPI, pydantic models and pandas: `ray start` took 1.9 s of CPU with
them and 1.0 s without (2.60). Ray's command line goes on without those that cannot be imported.
Run by path (`raylocal`): standard library and ray.
"""

from __future__ import annotations

import sys

_OTHERS = ("ray.serve.scripts", "ray.dashboard.modules.job.cli", "ray.util.state.state_cli")


def main() -> None:
    """Ray's own command line, by `sys.argv`."""
    for name in _OTHERS:
        sys.modules[name] = None  # type: ignore[assignment]  # whoever imports it gets an ImportError
    from ray.scripts import scripts

    scripts.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
