"""Fakes, clocks, fault injection and conformance suites, for our tests and those of adapters elsewhere."""
