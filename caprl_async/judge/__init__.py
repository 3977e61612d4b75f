"""Vision-free judges: an LLM that never sees the image answers questions from a caption alone."""
