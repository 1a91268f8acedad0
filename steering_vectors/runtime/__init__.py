"""Running a model fast, for fitting and serving alike: caches, runners, graphs, memory.

Knows nothing of sampling, text or queues.
"""
