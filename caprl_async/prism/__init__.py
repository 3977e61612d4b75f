"""What captions let answer: how an evaluation asks, what it makes of the answers, the page that compares."""
