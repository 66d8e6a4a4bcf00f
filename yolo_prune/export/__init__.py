"""Exported artefacts: compare them with PyTorch, and what their timings tell of a device."""
