"""What a sampler does, as arrays over the evaluations of the network."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from jaxdiff.diffusion.predictions import PREDICTIONS
from jaxdiff.diffusion.samplers import SAMPLERS, Path, Rule
from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.errors import ConfigError

PADDED = 2048  # rows, or a multiple of it: plans of as many rows are run by one program
Rows = Float64[np.ndarray, "n 3"]


class Process(Protocol):
    """x = a x_0 + s eps as a function of time: `schedules.Schedule`, `continuous.Edm` or `continuous.Flow`."""

    def levels(self, t: Array, ndim: int = 1) -> tuple[Array, Array]:
        """(a, s) of the times t, with axes of size 1 appended to `ndim`."""

    def network_time(self, t: Array) -> Array:
        """What the network is told of t."""

    def pairs(self, spacing: str, steps: int) -> tuple[Rows, Rows]:
        """(t, a, s) of the evaluations of a sampler, and of what each step leads to."""


class Churn(NamedTuple):
    """Noise before the steps: `amount` / steps of the level, at most sqrt(2) - 1, where low <= sigma <= high, with the
    deviation `spread` (S_churn, S_tmin, S_tmax and S_noise of arXiv 2206.00364, algorithm 2)."""

    amount: float
    low: float = 0.0
    high: float = float("inf")
    spread: float = 1.0


class Row(NamedTuple):
    """Of each evaluation: its time, the levels a and s there, the factor of the network's input, how its prediction F
    gives x_0 = x0_x x + x0_f F and eps = eps_x x + eps_f F, the step's rule, and the log variances between which a
    learned one lies; `learned` is 1 where that is used."""

    time: Any
    signal: Any
    sigma: Any
    input_scale: Any
    x0_x: Any
    x0_f: Any
    eps_x: Any
    eps_f: Any
    rule: Rule
    log_small: Any
    log_large: Any
    learned: Any


class Plan(NamedTuple):
    """`num_steps` evaluations, the deviation of the x that they begin with, and their rows, padded; on the host."""

    num_steps: Int[Array, ""] | np.int32
    initial_scale: Float[Array, ""] | np.float32
    rows: Row


def make_plan(
    process: Process,
    sampler: str = "ddim",
    *,
    steps: int = 50,
    spacing: str = "leading",
    eta: float = 0.0,
    churn: Churn | None = None,
    prediction: str = "eps",
    sigma_data: float = 0.5,
) -> Plan:
    """The plan of `sampler` for `steps` steps of a process, its coefficients computed in float64.

    Args: prediction, in `PREDICTIONS`: what the network's output is; sigma_data, of EDM's.
    Raises: ConfigError for an unknown sampler or spacing, too many steps, an eta outside [0, 1] or not used, churn with
      a sampler or a process that has none, or steps that do not follow on each other where they must.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sample.sampler = {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    method = SAMPLERS[sampler]
    if not 0 <= eta <= 1 or (eta and not method.eta):
        with_eta = ", ".join(name for name, other in SAMPLERS.items() if other.eta)
        raise ConfigError(f"sample.eta = {eta}: must be in [0, 1] for {with_eta}, 0 for other samplers")
    now, after = process.pairs(spacing, steps)
    if method.multistep and not np.array_equal(now[1:], after[:-1]):
        raise ConfigError(
            f"sample.spacing = {spacing!r}: must be one whose steps follow on each other, such as dpm, with "
            f"sample.sampler = {sampler!r}"
        )
    added, sigma = np.zeros(steps + 1), now[0, 2]
    if churn:
        if not method.churn or isinstance(process, Schedule) or eta or (now[:, 1] != 1).any():
            raise ConfigError(
                f"sample.churn = {tuple(churn)}: must be left out but with diffusion.schedule = 'edm' and "
                "sample.sampler = 'euler' or 'heun'"
            )
        now, added = _churned(now, churn)
    path = Path(now[:, 1], now[:, 2], after[:, 1], after[:, 2])
    rule = method.rule(path, eta)
    if method.evaluations == 2:
        now = np.stack([now, after], axis=1).reshape(-1, 3)[:-1]
    ends = np.arange(0, len(now), method.evaluations)  # the evaluations that end a step are those before these
    noise = np.broadcast_to(rule.noise, len(now)).copy()
    noise[ends[1:] - 1] = np.hypot(noise[ends[1:] - 1], added[1:-1])
    rule = rule._replace(noise=noise)

    t, a, s = now.T
    kind = PREDICTIONS[prediction]
    target = kind.target(a, s, sigma_data)
    det = a * target.eps - s * target.x0
    if (det == 0).any():
        raise ConfigError(
            f"diffusion.prediction = {prediction!r}: says nothing of the image where there is only noise; must be x0 "
            "or v with diffusion.zero_terminal_snr"
        )
    log_small, log_large = _log_variances(path) if method.learned else (0.0, 0.0)
    discrete = isinstance(process, Schedule)
    row = Row(
        time=t,
        signal=a,
        sigma=s,
        input_scale=kind.input_scale(a, s, sigma_data),
        x0_x=target.eps / det,
        x0_f=-s / det,
        eps_x=-target.x0 / det,
        eps_f=a / det,
        rule=rule,
        log_small=log_small,
        log_large=log_large,
        learned=float(method.learned),
    )
    padding = -len(now) % PADDED

    def pad(x: Any) -> Float32[np.ndarray, " rows"]:
        return np.pad(np.broadcast_to(x, len(now)), (0, padding)).astype(np.float32)

    rows = jax.tree.map(pad, row)
    if discrete:
        rows = rows._replace(time=rows.time.astype(np.int32))
    scale = 1.0 if discrete else np.hypot(sigma, added[0])  # the noisiest timestep counts as pure noise, as everywhere
    return Plan(np.int32(len(now)), np.float32(scale), rows)


def evaluations_together(plan: Plan) -> int:
    """10 where a plan, whose numbers are known, has a multiple of as many evaluations, else 1: see `sample`."""
    return 10 if int(plan.num_steps) % 10 == 0 else 1


def _churned(now: Rows, churn: Churn) -> tuple[Rows, Float64[np.ndarray, " n"]]:
    """The levels raised by churn, and the deviations of the noise that raises them, with a 0 for the end."""
    sigma = now[:, 2]
    inside = (churn.low <= sigma) & (sigma <= churn.high)
    raised = sigma * (1 + inside * min(churn.amount / len(sigma), np.sqrt(2) - 1))
    added = churn.spread * np.sqrt(raised**2 - sigma**2)
    return np.stack([raised, now[:, 1], raised], axis=-1), np.append(added, 0.0)


def _log_variances(path: Path) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Logarithms of the posterior's variance, that of the step before standing in for 0 in the last, and of beta."""
    beta = path.s**2 - (path.a / path.a_next * path.s_next) ** 2
    small = beta * (path.s_next / path.s) ** 2
    if len(small) > 1:
        small[-1] = small[-2] if small[-1] == 0 else small[-1]
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(small, 1e-40)), np.log(beta)


def plan_row(plan: Plan, i: Int[Array, "*index"], ndim: int = 0) -> Row:
    """The row(s) i of a plan, with axes of size 1 appended up to `ndim`."""

    def at(table: Array) -> Array:
        row = jnp.asarray(table)[i]
        return row.reshape(row.shape + (1,) * max(0, ndim - row.ndim)) if row.ndim else row

    return jax.tree.map(at, plan.rows)
