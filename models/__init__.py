"""Shipped data of permed_compute (package permed_compute.models); read through importlib.resources only."""
