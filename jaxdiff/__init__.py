"""Image diffusion models in JAX and Flax, trained by pure functions."""

import time

__version__ = "0.1.0"
STARTED = time.time()  # what is edited later is not what runs
