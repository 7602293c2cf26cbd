"""Image diffusion models in JAX and Flax, trained by pure functions."""

__version__ = "0.1.0"
