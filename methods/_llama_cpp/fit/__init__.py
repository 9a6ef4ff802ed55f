"""The search for the types of a GGUF's tensors: measured on the model in memory, chosen under a budget, written as a recipe."""
