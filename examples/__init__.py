"""Scripts that a reader can run and change."""
