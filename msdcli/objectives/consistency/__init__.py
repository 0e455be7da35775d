"""Consistency models: one answer along a whole path of the teacher or of the data."""
