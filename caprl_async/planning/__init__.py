"""What a conf will need of a cluster, computed before anything starts. Pure, but for reading checkpoints."""
