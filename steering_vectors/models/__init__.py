"""Models: loading, blocks, limits, hooks, masks, fingerprints. Only `hooks` registers hooks.

Knows nothing of requests, methods or how a model is run fast.
"""
