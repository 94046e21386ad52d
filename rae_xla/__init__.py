"""Representation Autoencoders and their diffusion transformers on Cloud TPU, with PyTorch/XLA."""

__version__ = "0.1.0"
