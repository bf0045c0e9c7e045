"""Compute sites: what is known of them, what they would refuse, what they charge, and the files that they are given."""
