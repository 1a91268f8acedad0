"""Applying shifts inside of a forward pass."""
