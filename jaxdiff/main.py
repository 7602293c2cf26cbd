"""Command line: python -m jaxdiff.main --config=FILE[:dataset] [--mode=...] [--workdir=...] [--config.FIELD=...]."""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from jaxdiff.errors import ConfigError, Interrupted, Stopped
from jaxdiff.interrupts import on_interrupt

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODES = {
    "train": "train, or go on, to the end",
    "report": "write one HTML page about one or several workdirs",
    "ladder": "train, sample and score all of configs/ladder.py in its minutes",
    "sample": "draw images from a checkpoint",
    "evaluate": "score a checkpoint, or images that there are",
    "prepare": "store a data set's images at the size that is trained on",
    "encode": "store a data set's latents",
    "import": "make a workdir of a folder of diffusers or ADM, --from",
    "export": "write a diffusers folder, --to, of a workdir",
}


def define_flags() -> None:
    """The flags; the config's default is read here, with the fields that the command line gives."""
    default = str(ROOT / "configs" / "ldm_cfg.py")
    config_flags.DEFINE_config_file("config", default, "Experiment, FILE or FILE:dataset; fields by --config.FIELD=...")
    flags.DEFINE_enum("mode", "train", list(MODES), "; ".join(f"{name}: {what}" for name, what in MODES.items()))
    flags.DEFINE_multi_string("workdir", None, "Folder of the run; default runs/<config.name>; several for the report.")
    flags.DEFINE_integer("step", None, "Checkpoint to sample from, to score, or to export; default the newest.")
    flags.DEFINE_string("from", None, "--mode=import: folder with a model of diffusers or ADM.")
    flags.DEFINE_string("to", None, "--mode=export: folder to write; --mode=report: file, default WORKDIR/report.html.")
    flags.DEFINE_enum("format", None, ["diffusers"], "--mode=export: of the folder; default diffusers.")


def parse(argv: list[str]) -> list[str]:
    """Define and parse the flags; whatever is wrong with them is a ConfigError."""
    try:
        define_flags()
        rest = flags.FLAGS(argv)
        _ = flags.FLAGS.config.name  # a file that cannot be read is an error only now
        return rest
    except AttributeError as error:
        inner = error.args[0]  # the config's KeyError, where it is one
        name, _, hint = str(inner.args[0] if isinstance(inner, KeyError) else inner).partition("\n")
        raise ConfigError(f"--config has no field {name}. {hint} All fields: jaxdiff/config/fields.py") from None
    except (flags.Error, KeyError, TypeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        _, ours, message = text.rpartition("jaxdiff.errors.ConfigError: ")  # what a config file raised
        raise ConfigError(message if ours else text) from None


def run(argv: list[str]) -> None:
    """Do what the parsed flags say."""
    args = flags.FLAGS
    if argv[1:]:
        raise ConfigError(f"argument {argv[1]!r}: not understood; every argument begins with --")
    if args.step is not None and args.mode not in ("sample", "evaluate", "export"):
        raise ConfigError(
            f"--step={args.step}: for --mode=sample, evaluate and export; training goes on from the newest"
        )
    for flag, mode, also in (("from", "import", ()), ("to", "export", ("report",))):
        given = args[flag].value is not None
        if given != (args.mode == mode) and not (given and args.mode in also):
            where = " or ".join([f"--mode={mode}", *(f"--mode={other}" for other in also)])
            what = f"must be given with {where}, and only there" if given else f"must be given with --mode={mode}"
            raise ConfigError(f"--{flag}={args[flag].value or ''}: {what}")
    overrides = config_flags.get_override_values(args["config"])
    if overrides and args.mode == "report":
        raise ConfigError(f"--config.{next(iter(overrides))}: must be left out with --mode=report, which reads runs")
    if args.workdir and args.mode == "prepare":
        raise ConfigError(
            f"--workdir={args.workdir[0]}: not with --mode=prepare; --config.data.prepared names its folder"
        )
    if args.workdir and len(args.workdir) > 1 and args.mode != "report":
        raise ConfigError(f"--workdir={args.workdir[1]}: only --mode=report takes several")
    if args.format and args.mode != "export":
        raise ConfigError(f"--format={args.format}: must be given with --mode=export only")
    if (args.config.experiment == "ladder") != (args.mode == "ladder") and args.mode != "report":
        only = "configs/ladder.py is for --mode=ladder" if args.mode != "ladder" else "needs --config=configs/ladder.py"
        raise ConfigError(f"--mode={args.mode} with --config={args.config.name}: {only}")
    # The libraries' running commentary, to which Orbax adds the traceback of each thread of whatever it raises as well;
    # XLA's while it tries out GPU kernels cannot be turned off later.
    logging.set_verbosity(logging.FATAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jaxdiff import startup  # imports JAX, which --help and a misspelt flag need not wait for

    workdirs = [pathlib.Path(folder) for folder in args.workdir or [f"runs/{args.config.name}"]]
    workdir = workdirs[0]
    named = args.config.name if args["config"].present else None
    if args.mode == "train":
        startup.train(args.config, workdir, overrides)
    elif args.mode == "ladder":
        startup.ladder(args.config, workdir, overrides)
    elif args.mode == "prepare":
        startup.prepare(args.config)
    elif args.mode == "encode":
        startup.encode(args.config, workdir)
    elif args.mode == "import":
        startup.import_model(args.config, workdir, pathlib.Path(str(args["from"].value)), overrides)
    elif args.mode == "export":
        startup.export_model(workdir, pathlib.Path(args.to), named, overrides, args.step)
    elif args.mode == "report":
        startup.report(workdirs, args.to and pathlib.Path(args.to))
    elif args.mode == "evaluate":
        startup.evaluate(workdir, named, overrides, args.step)
    else:
        startup.sample(workdir, named, overrides, args.step)


def main() -> None:
    """Entry point; what a user can mend ends in one line and exit status 2, a stop on request in 128 + signal."""
    on_interrupt()
    try:
        app.run(run, flags_parser=parse)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # while nothing is being trained: there is nothing to save
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (Stopped, Interrupted) as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signum)


if __name__ == "__main__":
    main()
