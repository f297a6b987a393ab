"""Baselines, metrics, benchmark and its figures."""
