"""The migrations of the feedback database, which Alembic runs when a server or a command opens it."""
