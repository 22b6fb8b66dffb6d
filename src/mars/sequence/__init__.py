"""Text and images as ids: the joint vocabulary, the text tokenizer, and how a sequence is laid out."""
