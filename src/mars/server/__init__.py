"""MARS over HTTP, in the shapes of the OpenAI API; web frameworks are imported in this room only."""
