"""Durable jobs and the hash-chained event log."""
