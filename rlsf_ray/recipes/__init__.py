"""Recipes: one YAML file chooses the parts of a method."""
