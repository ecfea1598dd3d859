"""Measurements, each a script that says how it is run."""
