"""Runs that are killed at random points, and whether anything was lost that was promised."""
