"""The integration with DeepSpeed: how an optimizer gets in, and where its parameters' elements then lie."""
