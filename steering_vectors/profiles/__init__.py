"""Profiles: their fields, their files, and mixtures of them. Knows nothing of loaded models or of HTTP."""
