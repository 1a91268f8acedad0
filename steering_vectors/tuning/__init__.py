"""Tuning: reading and training a model on preference data. Knows nothing of profiles."""
