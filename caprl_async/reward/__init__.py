"""From verdicts, length and format to one reward; pure functions."""
