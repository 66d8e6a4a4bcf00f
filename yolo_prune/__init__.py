"""yolo_prune: prune YOLO detectors into slimmer, measurably faster ones that stock Ultralytics loads."""

__version__ = "0.1.0"
