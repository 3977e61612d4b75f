"""Models that are asked for texts: to make questions, to answer them, to compare answers, to caption."""
