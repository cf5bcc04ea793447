"""What Helena costs, as ratios within one run: `python -m tests.benchmarks`."""
