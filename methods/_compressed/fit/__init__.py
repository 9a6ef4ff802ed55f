"""Which layers of a compressed checkpoint get more bits: chosen by measured divergence, under a budget of bytes."""
