"""Prompts in, answer checks out."""
