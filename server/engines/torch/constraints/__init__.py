"""What a text must be: compiling it, keeping it, and which tokens it allows next."""
