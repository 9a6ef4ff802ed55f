"""Shared by the methods that write GGUF through llama.cpp."""
