"""Preference data: files, rows, chat templates, tokens, batches. Knows nothing of steering."""
