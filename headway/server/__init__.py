"""An OpenAI-compatible server around the engine, and its page."""
