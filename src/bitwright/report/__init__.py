"""Comparisons of methods on one model, and pages for people to read: one self-contained HTML file each."""
