"""GPT-2 in every published format, in, out and verified."""
