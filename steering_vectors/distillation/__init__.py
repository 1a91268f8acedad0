"""A profile without hooks: as a LoRA, or as biases in the model's weights."""
