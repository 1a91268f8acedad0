"""Which rows run in a step, and what is computed of them already. No torch."""
