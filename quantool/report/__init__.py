"""Findings as files, tables and pictures."""
