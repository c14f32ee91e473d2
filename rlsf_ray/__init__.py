"""rlsf-ray: a language model improves itself from its own feedback, spread over a Ray cluster."""

__version__ = "0.1.0"
