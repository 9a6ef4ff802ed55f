"""Answers of reference and artifact, kept under what they depend on."""
