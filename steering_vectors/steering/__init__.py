"""Applying shifts inside of a forward pass. Knows nothing of requests or of how a pass is computed."""
