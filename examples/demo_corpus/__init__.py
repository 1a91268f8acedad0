"""The generator of the embedded demo model's training text: everyday topics in opposite manners."""
