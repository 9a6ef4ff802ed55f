"""Shared by the methods that write compressed-tensors through llmcompressor."""
