"""Benchmarks of trimtab. Each is a script."""
