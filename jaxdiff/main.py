"""Command line: python -m jaxdiff.main --config=FILE[:dataset] [--mode=...] [--workdir=...] [--config.FIELD=...]."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxdiff.errors import ConfigError, Stopped

ROOT = pathlib.Path(__file__).resolve().parent.parent

CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(ROOT / "configs" / "ldm_cfg.py"),
    "Experiment, FILE or FILE:dataset; fields by --config.FIELD=...",
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ("train", "sample"),
    "train: to the end, going on where it stopped; sample: from a checkpoint.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config.name>.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to sample from; default the newest.")


def run(argv: list[str]) -> None:
    """Do what the parsed flags say."""
    if argv[1:]:
        raise ConfigError(f"argument {argv[1]!r}: not understood; every argument begins with --")
    logging.set_verbosity(logging.ERROR)  # the libraries' running commentary
    from jaxdiff import startup  # imports JAX, which --help and a misspelt flag need not wait for

    workdir = pathlib.Path(WORKDIR.value or f"runs/{CONFIG.value.name}")
    if MODE.value == "train":
        startup.train(CONFIG.value, workdir)
    else:
        startup.sample(workdir, config_flags.get_override_values(flags.FLAGS["config"]), STEP.value)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; whatever is wrong with them is a ConfigError."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def main() -> None:
    """Entry point; what a user can mend ends in one line and exit status 2, a stop on request in 128 + signal."""
    try:
        app.run(run, flags_parser=parse)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
