"""Routes and the forms of their bodies and answers. Knows nothing of how an engine computes."""
