"""Exported artefacts: run them, compare them with PyTorch, time them."""
