"""Tensors in one process: generating, scoring, learning."""
