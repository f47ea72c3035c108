"""Tongyun: chip, cloud and model as one system, and what a million tokens costs on it."""

__version__ = "0.1.0"
