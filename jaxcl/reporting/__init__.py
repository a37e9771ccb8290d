"""Plots, the HTML report and comparison tables."""
