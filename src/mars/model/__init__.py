"""The transformer: it runs segments of ids and never sees a tokenizer."""
