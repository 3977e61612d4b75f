"""The learner: advantages, corrected policy loss, micro-batches, and the DeepSpeed ranks that use them."""
