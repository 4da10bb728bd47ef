"""What a step costs as models, their numbers of tensors, and clusters grow."""
