"""Evaluation: what a profile does to held-out preferences and to trust. Knows nothing of commands or of display."""
