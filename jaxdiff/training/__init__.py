"""Training: objectives, the step, the loop over it, and its records."""
