"""Generators: image tokens from text or class labels."""
