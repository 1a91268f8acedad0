"""Running a model fast, for fitting and serving alike: caches, runners, graphs, memory."""
