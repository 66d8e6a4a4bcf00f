"""Shortcut removal: a network of this host without additions, equal and made of stock layers."""

from yolo_prune.hosts.ultralytics.shortcuts.removal import LayerNote, Rewritten, remove_shortcuts

__all__ = ["LayerNote", "Rewritten", "remove_shortcuts"]
