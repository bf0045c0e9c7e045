"""`python -m permed_compute.cli`: the same program where its script is not on PATH."""

from __future__ import annotations

import sys

from permed_compute.cli import main

sys.exit(main())
