"""What the server does under overload, hostile input and clients that misbehave."""
