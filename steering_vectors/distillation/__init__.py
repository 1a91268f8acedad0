"""Distillation: a profile as weights, as a LoRA or as biases. Knows nothing of commands."""
