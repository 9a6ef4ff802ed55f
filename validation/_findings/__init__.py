"""Measured numbers as findings: limits, error bars, statistics."""
