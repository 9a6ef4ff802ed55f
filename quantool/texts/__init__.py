"""Held-out and calibration text."""
