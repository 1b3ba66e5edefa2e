"""Comparisons with other methods and ablations."""
