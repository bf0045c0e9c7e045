"""Shipped data of permed_compute (package permed_compute.configs); read through importlib.resources only."""
