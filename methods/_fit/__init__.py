"""Choosing a type for each group of matrices: allocation under a budget, whatever the format."""
