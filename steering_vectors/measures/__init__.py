"""Measures: activations, likelihoods, divergences and samples of a model. Knows nothing of methods or of files."""
