"""Prompts become caption groups: sampling and the actor that holds the policy engine."""
