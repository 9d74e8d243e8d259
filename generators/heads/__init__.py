"""Token heads: from what the backbone knows of a position to its token."""
