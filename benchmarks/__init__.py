"""Benchmarks: ours beside its peers, in one run. See README.md; `permed bench --list` names them."""
