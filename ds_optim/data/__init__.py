"""Text in, batches of token ids out: documents, their split, tokenizers, the windows that each step takes."""
