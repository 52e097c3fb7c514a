"""Speed and memory of the distance, measured beside its alternatives. Not installed: run from the root of a checkout.

pytest benchmarks/ --benchmark-only            measure; rows go to benchmarks/results/
python -m benchmarks.report --targets          what the rows say about what the library set out to reach
python -m benchmarks.report --readme README.md plots, and the table of the README
"""
