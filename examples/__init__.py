"""Run from the root of a checkout: `python -m examples.tiny_i2v.check`. Not installed."""
