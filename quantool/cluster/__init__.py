"""A run as a graph of stages, and the machines that it is spread over."""
