"""Training: full-parameter today; the loop, checkpoints and data order are the same for every objective."""
