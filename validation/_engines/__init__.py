"""llama.cpp, transformers and vLLM as engines, and the reference that artifacts are compared with."""
