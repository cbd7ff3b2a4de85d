"""ONNX: one file that stock onnxruntime runs, state in and state out. Needs the extra `linearize[onnx]`.

`schema.py` says what the operators mean, `body.py` writes them in standard operators, `export.py` makes the
file. Nothing outside of this package imports it at import time.
"""
