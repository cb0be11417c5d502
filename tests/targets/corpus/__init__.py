"""Kernels with known verdicts; see README.md."""
