"""Perplexity per source and what the model writes."""
