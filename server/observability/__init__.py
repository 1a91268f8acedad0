"""What an operator sees of a running server: metrics, logs, request ids and traces. It knows nothing of bodies, routes
or engines beyond the messages of the protocol."""
