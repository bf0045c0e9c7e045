"""Shipped data of permed_compute (package permed_compute.cluster); read through importlib.resources only."""
