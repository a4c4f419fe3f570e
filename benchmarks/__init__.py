"""The costs of this package: `python -m benchmarks` measures everything and writes a page of `results/` for each.

A benchmark is a module with a `measure(quick)` that gives a `report.Part`, and its name in `__main__.BENCHMARKS`. One
that not every machine can run has a `missing()` that says what is not there: nothing, where it can.
"""
