"""Example scripts to run and change."""
