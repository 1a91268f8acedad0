"""From logits to tokens, and what is reported of them."""
