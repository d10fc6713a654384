"""Texts, token files and batches."""
