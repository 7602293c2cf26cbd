"""What guidance costs: seconds a batch of samples without it, with it, and with it at a fifth of the timesteps.

    python -m benchmarks.guidance                     # the UNet of the digits' latents
    python -m benchmarks.guidance --dataset=cifar10   # another of configs/ldm_cfg.py

The UNet is a new one, on latents that are not decoded. Settings take turns; medians of the rounds are printed.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import ldm_cfg
from jaxdiff import mesh as meshes
from jaxdiff.generator import Generator

SETTINGS = {
    "w = 0": {"guidance": 0.0},
    "w = 2": {"guidance": 2.0},
    "w = 2 at t in 400..599": {"guidance": 2.0, "guidance_interval": (400, 599)},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--num", type=int, default=64, help="images, in one batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = ldm_cfg.get_config(args.dataset)
    side = config.data.image_size // 2 ** (len(config.autoencoder.channel_mult) - 1)
    shape = (side, side, config.autoencoder.latent_channels)
    generator = Generator(config, shape, 10, meshes.make_mesh())
    one = jnp.zeros((1,), jnp.int32)
    params = jax.jit(generator.network.init)(jax.random.key(0), jnp.zeros((1, *shape)), one, one)
    config.sample.update(num=args.num, batch_size=args.num, steps=50)
    labels = np.arange(args.num) % 10
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for k in range(args.rounds + 1):  # the first compiles
        for name, changes in SETTINGS.items():
            config.sample.update(guidance_interval=())
            config.sample.update(changes)
            begin = time.perf_counter()
            generator(params, config.sample, labels)
            seconds[name] += [time.perf_counter() - begin] if k else []
    plain = statistics.median(seconds["w = 0"])
    print(f"{args.num} x {shape} on {jax.device_count()} x {jax.devices()[0].device_kind}, 50 steps")
    for name, times in seconds.items():
        print(f"{name:24} {statistics.median(times):8.3f} s   x {statistics.median(times) / plain:.2f}")


if __name__ == "__main__":
    main()
