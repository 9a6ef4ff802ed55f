"""The model card: records in, README.md out."""
