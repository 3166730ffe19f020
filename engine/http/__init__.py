"""The OpenAI-compatible HTTP process: a client of the engine like any other."""
