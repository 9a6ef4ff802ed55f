"""Importance matrices: what llama.cpp's activations are collected from, the file, and how one is computed or taken."""
