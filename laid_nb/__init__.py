"""Long-window anchoring (LAid) for vision-language models."""

__version__ = "0.1.0"
