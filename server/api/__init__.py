"""Routes, their bodies and their answers. Knows nothing of how an engine computes."""
