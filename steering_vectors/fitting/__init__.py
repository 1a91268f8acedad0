"""Fitting: from preference data to a calibrated profile. Knows nothing of files or of commands."""
