"""Measurements: procedural tasks and the protocols that run them."""
