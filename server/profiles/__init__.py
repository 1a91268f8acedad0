"""The profiles that are served."""
