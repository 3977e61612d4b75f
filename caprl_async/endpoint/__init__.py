"""Models that are served elsewhere, over an OpenAI-compatible API (chat completions)."""
