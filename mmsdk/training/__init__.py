"""Training: one accelerate-based loop, and the recipes that made the embedded models."""
