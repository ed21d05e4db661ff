"""
Speed and memory of SENSE beside its peers, all measured in one run: `python -m benchmarks` (or `make bench`).

Random weights of the real sizes, so nothing is downloaded and nothing is said about quality.
"""
