"""The routes of this server's own form: generate, compare, score, and changing a running steering."""
