"""Registers the atlases of a prepared dataset to its cases, caches and draws the results, and suggests an atlas."""
