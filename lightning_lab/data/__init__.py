"""Rows in, optimizer steps out."""
