"""From a request's body to what an engine is asked, and from an engine's events to what an answer is made of."""
