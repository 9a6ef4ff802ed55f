"""What a method and a check are, and how one is found by name."""
