"""Pictures and captions, from where people keep them to shards."""
