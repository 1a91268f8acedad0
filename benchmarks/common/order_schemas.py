"""JSON schemas for constrained generation: one of medium size with bounded texts, and variants with long texts."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
DISHES = ("soup", "bread", "salad", "stew", "pie", "rice", "tea", "cake")


def order() -> Schema:
    """Nested objects, enums, bounded arrays, numbers and strings, patterns, and an optional property."""
    address = _object(
        street={"type": "string", "pattern": "^[A-Z][a-z]{2,9} (Road|Lane|Street) [1-9][0-9]{0,2}$"},
        postcode={"type": "string", "pattern": "^[0-9]{5}$"},
    )
    customer = _object(
        name={"type": "string", "minLength": 1, "maxLength": 16},
        tier={"enum": ["new", "regular", "gold"]},
        address=address,
    )
    item = _object(
        dish={"enum": list(DISHES)},
        count={"type": "integer", "minimum": 1, "maximum": 20},
        note={"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]},
    )
    whole = _object(
        id={"type": "string", "pattern": "^[A-F0-9]{4}-[A-F0-9]{4}$"},
        customer=customer,
        items={"type": "array", "minItems": 1, "maxItems": 3, "items": item},
        tags={"type": "array", "maxItems": 3, "items": {"enum": ["cold", "hot", "spicy", "vegan"]}},
        paid={"type": "boolean"},
        total={"type": "number", "minimum": 0, "maximum": 1000},
    )
    whole["properties"]["remark"] = {"type": "string", "maxLength": 20}
    return whole


def long_order(number: int) -> Schema:
    """A variant with names and dishes of its own for each number, and more items than fit into a few hundred tokens."""
    item = _object(
        **{
            f"dish{number}": {"enum": [f"{dish} {number}" for dish in DISHES]},
            "count": {"type": "integer", "minimum": 1, "maximum": 20 + number},
            f"note{number}": {"type": "string", "maxLength": 12 + number},
            "code": {"type": "string", "pattern": f"^[A-Z]{{2,{4 + number}}}-[0-9]{{{3 + number}}}$"},
        }
    )
    return _object(title={"type": "string", "maxLength": 20}, items={"type": "array", "minItems": 200, "items": item})


def _object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
