"""Data sets, built from packages."""
