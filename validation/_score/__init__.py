"""Perplexity and divergence of artifacts beside the reference."""
