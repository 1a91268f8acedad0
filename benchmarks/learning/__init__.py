"""Benchmarks of learning from people: what votes make of a profile."""
