"""Preference pairs that models write and judge: a profile from a sentence, and debates. Each step is a file that can be
edited. Knows nothing of commands."""
