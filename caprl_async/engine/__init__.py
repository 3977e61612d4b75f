"""The one wrapper around vLLM, used by rollouts, judges and jobs."""
