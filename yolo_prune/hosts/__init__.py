"""The only code that knows a host: Ultralytics, classic YOLOv5, and what they share."""
