"""The engine on plain transformers: one thread owns the model and runs step after step."""
