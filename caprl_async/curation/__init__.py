"""Images become questions: written by a model that sees, checked with the image and without it."""
