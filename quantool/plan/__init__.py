"""``Config`` and ``Source`` in, ``Plan`` out: everything decided before weights are touched."""
