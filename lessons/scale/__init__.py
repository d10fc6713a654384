"""The measurements of lesson 3, a file for each of its sections."""
