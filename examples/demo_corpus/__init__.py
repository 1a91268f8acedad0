"""The generator of the embedded demo model's text: everyday topics told in opposed manners."""
