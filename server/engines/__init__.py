"""Engines, and the protocol they stand behind. Knows nothing of HTTP."""
