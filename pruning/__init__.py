"""Pruning of the visual tokens of vision-language models."""
