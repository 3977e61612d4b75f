"""A tiny real world: rendered images with exact facts, their questions, and models for two cores."""
