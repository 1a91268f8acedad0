"""What every route needs of HTTP: errors, limits, JSON, event streams, the socket. Knows nothing of models."""
