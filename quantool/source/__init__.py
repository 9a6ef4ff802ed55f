"""A checkpoint on disk or on the Hub: ``Source``, and what its files say."""
