"""The fields of request bodies, as pydantic models. The rest of the server works on dataclasses made from them."""
