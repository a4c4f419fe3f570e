"""What this package costs: `python -m benchmarks.startup`."""
