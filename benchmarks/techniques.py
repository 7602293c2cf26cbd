"""Techniques compared at equal budget: each is trained for as many steps, and sampled by several samplers.

    python -m benchmarks.techniques --experiment=ddpm --dataset=digits --workdir=runs/techniques
    python -m benchmarks.techniques --experiment=ddpm --dataset=cifar10 --names=base,v,flow --steps=1500 \\
        --set data.path=data/cifar10 --set batch_size=256

Names are those of configs/ablations.py. A technique that is finished in the workdir is not computed again; the tables
of all that are finished there are printed, and written to WORKDIR/techniques.md and techniques.json. Distances are FD
of `--num` samples without guidance, against validation images; columns are evaluations of the network for a sample, of
which heun needs two a step.
"""

import argparse
import ast
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import ablations
from jaxdiff import mesh as meshes
from jaxdiff.config import check, files
from jaxdiff.data import load_source
from jaxdiff.evaluation.evaluate import Scorer, with_fields
from jaxdiff.evaluation.judge import Judge
from jaxdiff.evaluation.likelihood import likelihood_record
from jaxdiff.evaluation.records import add_record, read_scores, write_validation
from jaxdiff.training.loop import fit
from jaxdiff.training.stages import diffusion_stage

SAMPLERS = {
    "edm": ("euler", "heun", "dpmpp_2m", "unipc"),
    "flow": ("euler", "heun", "dpmpp_2m", "unipc"),
    "discrete": ("ddim", "ddpm", "heun", "dpmpp_2m", "unipc"),
}
EVALUATIONS = (10, 20, 50)
SPACINGS = {"edm": "karras", "flow": "even", "discrete": "trailing"}


def main() -> None:
    """Train, sample, score, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="ddpm")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--names", default=",".join(ablations.ABLATIONS), help="techniques, commas between")
    parser.add_argument("--steps", type=int, default=1000, help="of training, for each")
    parser.add_argument("--num", type=int, default=300, help="samples for each distance")
    parser.add_argument("--nll", type=int, default=0, help="validation images whose likelihood is bounded")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the config, for all")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    args = parser.parse_args()
    mesh = meshes.make_mesh()
    for name in args.names.split(","):
        config = ablations.get_config(f"{name},{args.experiment},{args.dataset}")
        config.update(epochs=0.0, steps=args.steps, sample_every=0, checkpoint_every=args.steps)
        config.sample.guidance = 0.0
        config.eval.update(scores=("fd",), num=args.num)
        set_fields(config, args.set)
        check.validate(config, mesh.size)
        compare(config, args.workdir / name, args.nll, mesh)
        print(write_tables(args.workdir))


def set_fields(config: ConfigDict, assignments: Sequence[str]) -> None:
    """Set fields of `config`, each by FIELD=VALUE, a path or a Python literal."""
    for assignment in assignments:
        field, value = assignment.split("=", 1)
        config.update_from_flattened_dict({field: value if field.endswith("path") else ast.literal_eval(value)})


def compare(config: ConfigDict, folder: pathlib.Path, nll: int, mesh: Any) -> None:
    """Train in `folder`, and put the records of all samplers there, and of the likelihood where there is one."""
    begin, kind = time.monotonic(), config.diffusion.schedule
    kind = kind if kind in SAMPLERS else "discrete"
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    fresh = not folder.exists()
    files.claim_workdir(config, folder)
    experiment, generator = diffusion_stage(config, folder, train, val, mesh)
    result = fit(experiment, config, folder, mesh)  # restores what is finished
    if not read_scores(folder)["validation"]:
        write_validation(folder, result.validation, len(val))
        if fresh:  # else it is the seconds of the last start only
            files.write_json(folder / "seconds.json", {"training": time.monotonic() - begin})
    params, step = result.state.ema, int(result.state.step)
    scorer = Scorer(config, folder, generator, Judge(config.eval, train, val, mesh), train.class_names)
    if nll and kind == "discrete" and not any("bound" in r["protocol"] for r in read_scores(folder)["records"]):
        protocol = {"weights": "ema", "seed": config.sample.seed, "step": step, "ema_decay": config.ema_decay}
        add_record(folder, likelihood_record(generator, params, config.sample, val, nll, protocol))
    for sampler in SAMPLERS[kind]:
        for evaluations in EVALUATIONS:
            steps = evaluations // 2 if sampler == "heun" else evaluations
            fields = {"sampler": sampler, "steps": steps, "spacing": SPACINGS[kind], "num": config.eval.num}
            settings = with_fields(config.sample, **fields)
            if scorer.known(settings, step) is None:
                scorer(params, settings, step)


def write_tables(workdir: pathlib.Path) -> str:
    """The tables of all that is finished in `workdir`, as Markdown, which is written there as well."""
    losses, distances, everything = [], [], {}
    for folder in (workdir / name for name in ablations.ABLATIONS):
        content = read_scores(folder)
        if not content["records"]:
            continue
        records = everything[folder.name] = content["records"]
        bits = [v for r in records for n, v in r["scores"].items() if n.endswith("bits_per_dim")]
        timed = folder / "seconds.json"
        seconds = f"{json.loads(timed.read_text())['training']:.0f}" if timed.exists() else ""
        loss = content["validation"]["val_loss"]
        losses.append(f"| {folder.name} | {loss:.4g} | {f'{bits[0]:.3f}' if bits else ''} | {seconds} |")
        table: dict[str, list[str]] = {}
        for record in (r for r in records if "sampler" in r["protocol"]):
            (value,) = record["scores"].values()
            table.setdefault(record["protocol"]["sampler"], []).append(f"{value:.1f}")
        distances += [f"| {folder.name} | {sampler} | {' | '.join(row)} |" for sampler, row in table.items()]
    last = next(r for r in reversed(list(everything.values())[-1]) if "sampler" in r["protocol"])
    ((score, floor),) = last["floor"].items()
    p = last["protocol"]
    text = "\n".join(
        [
            f"{p['num']:,} samples at step {p['step']:,} against {p['reference']['num']:,} {p['reference']['name']} "
            f"images; {p['weights']} weights, seed {p['seed']}; {last['device']}. Floor of the distance: {floor:.1f}.",
            "",
            "| technique | validation loss | bits/dim | training, s |",
            "|---|---|---|---|",
            *losses,
            "",
            f"| {score} | sampler | {' | '.join(f'{n} evaluations' for n in EVALUATIONS)} |",
            "|---|---|---|---|---|",
            *distances,
        ]
    )
    (workdir / "techniques.md").write_text(text + "\n")
    files.write_json(workdir / "techniques.json", everything)
    return text


if __name__ == "__main__":
    main()
