"""The training step and what a run needs around it."""
