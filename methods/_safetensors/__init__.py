"""Shared by the methods that write safetensors themselves."""
