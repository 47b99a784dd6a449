"""Pretraining of 3D medical object detectors."""

__version__ = "0.1.0"
