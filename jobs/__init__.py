"""Shipped data of permed_compute (package permed_compute.jobs); read through importlib.resources only."""
