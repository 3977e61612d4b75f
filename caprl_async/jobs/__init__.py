"""What a conf can ask for; each job is one module with `run(config)`."""
