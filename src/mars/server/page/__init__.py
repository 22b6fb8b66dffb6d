"""The page: MARS for a person, in English and Chinese. Needs Gradio; nothing else in the server does."""
