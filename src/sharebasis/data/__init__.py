"""Texts -> windows of tokens."""
