"""Mesh, logical-axis rules and process start-up."""
