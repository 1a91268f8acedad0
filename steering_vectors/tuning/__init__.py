"""Training on preferences, for the methods that begin with it."""
