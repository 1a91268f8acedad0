"""trimtab's own routes: generate, compare, score, and those about steering."""
