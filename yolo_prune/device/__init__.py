"""What runs on the device too: exported artefacts loaded, compared and timed.

A bundle carries this package as it is, so it keeps to Python 3.8 (JetPack 5), numpy, OpenCV and the runtime of the
artefact, and knows nothing of yolo_prune but the errors and how files are written. Heads with a top-k, which no bundle
holds, are compared with SciPy.
"""
