"""What clients may send, as pydantic models. Everything else in the server works on dataclasses made from these."""
