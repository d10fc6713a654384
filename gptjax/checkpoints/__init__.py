"""Saving, restoring and checking the steps of a run."""
