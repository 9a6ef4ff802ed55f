"""What an artifact's files say of themselves: headers, names, samples of their numbers."""
