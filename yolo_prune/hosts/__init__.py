"""The only code that knows a host (Ultralytics, later classic YOLOv5)."""
