"""File layouts of the field, each described once."""
