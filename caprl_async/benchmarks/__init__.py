"""Published question sets: their files, and how an answer to them is scored."""
