"""Shared by the methods that write GGUF through llama.cpp, whose files were read at commit 0c1e570 (llama-cpp-python 0.3.36)."""
