"""The HTTP service: it loads a model, serves profiles and streams what the model writes."""
