"""Data sets, their formats, images by content hash, and the order in which prompts are drawn."""
