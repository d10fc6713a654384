"""One file for each format in which people hold GPT-2."""
