"""Measurements of trimtab, each a script of its own."""
