"""What several benchmarks set up: a home with its controller, a bare Ray."""
