"""Whole runs of pytest in fresh processes: two sides against each other, and one often enough to know its noise."""
