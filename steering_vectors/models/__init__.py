"""Models: loading, finding blocks, hooks, masks, fingerprints. Only `hooks` registers hooks."""
