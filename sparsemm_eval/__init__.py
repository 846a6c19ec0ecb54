"""Evaluate and accelerate KV-cache compression of multimodal LLMs (SparseMM, ICCV 2025)."""

__version__ = "0.1.0"
