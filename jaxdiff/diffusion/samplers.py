"""Step rules of the samplers: coefficients, in float64 on the host. A new one is a function and a line in `SAMPLERS`.

All are linear in what a sampler knows: x, the predictions of x_0 (now, last, and before that) and of eps, and noise.
What differs is the coefficients, so that one loop (`loop.py`) runs them all.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

Table = Float64[np.ndarray, " n"]


class Path(NamedTuple):
    """Levels of x = a x_0 + s eps that the steps begin at, and that they lead to."""

    a: Table
    s: Table
    a_next: Table
    s_next: Table


class Correction(NamedTuple):
    """x at an evaluation, once its prediction is known: of x, the corrected x of the evaluation before it, and the
    predictions of x_0 of this one, the last, and the one before. As given, x stays what it is."""

    x: Any = 1.0
    base: Any = 0.0
    now: Any = 0.0
    last: Any = 0.0
    before: Any = 0.0


class Rule(NamedTuple):
    """The next x = x * x + x0 * pred_x0 + eps * pred_eps + last * pred_x0 of the last evaluation + noise * z."""

    x: Any = 0.0
    x0: Any = 0.0
    eps: Any = 0.0
    last: Any = 0.0
    noise: Any = 0.0
    correction: Correction = Correction()


def ddim(path: Path, eta: float = 0.0) -> Rule:
    """DDIM (arXiv 2010.02502, eqs. 12 and 16): eta = 0 is deterministic, 1 as noisy as `ddpm`.

    With eta = 0 it is Euler's method for the probability flow, of EDM and of flow matching as well.
    """
    sigma = eta * ddpm(path).noise
    return Rule(x0=path.a_next, eps=np.sqrt(path.s_next**2 - sigma**2), noise=sigma)


def ddpm(path: Path, eta: float = 0.0) -> Rule:
    """Ancestral sampling with the posterior's variance, or that which the network learned (DDPM eq. 7, algorithm 2).

    For any process: Kingma et al. 2021 (arXiv 2107.00630), appendix A.
    """
    a, s, a_next, s_next = path
    ratio = a / a_next
    beta = s**2 - (ratio * s_next) ** 2
    return Rule(x=ratio * s_next**2 / s**2, x0=a_next * beta / s**2, noise=np.sqrt(beta) * s_next / s)


def ddpm_large(path: Path, eta: float = 0.0) -> Rule:
    """Ancestral sampling with the larger variance, beta; noiseless, as all of them, in the step to the clean end."""
    a, s, a_next, s_next = path
    return ddpm(path)._replace(noise=np.sqrt(s**2 - (a / a_next * s_next) ** 2) * (s_next > 0))


def heun(path: Path, eta: float = 0.0) -> Rule:
    """Heun's method in (a, s): x' = x + (a' - a) mean(x_0) + (s' - s) mean(eps) over both ends of the step.

    Two evaluations a step, but one in the last. For a = 1 it is EDM's (arXiv 2206.00364, algorithm 1), for
    a = 1 - t, s = t that of the flow's velocity.
    """
    first = ddim(path)
    a, s, a_next, s_next = (table[:-1] for table in path)  # of the second evaluations
    da, ds = (a_next - a) / 2, (s_next - s) / 2
    second = Rule(
        x=np.ones_like(a),
        correction=Correction(
            x=ds / s_next, base=1 + ds / s, now=da - ds * a_next / s_next, last=da - ds * a / s, before=0 * a
        ),
    )

    def interleave(one: Any, two: Any) -> Table:
        out = np.zeros(2 * len(path.a) - 1)
        out[::2], out[1::2] = one, two
        return out

    corrections = zip(first.correction, second.correction, strict=True)
    correction = Correction(*(interleave(one, two) for one, two in corrections))
    names = [name for name in Rule._fields if name != "correction"]
    fields = {name: interleave(getattr(first, name), getattr(second, name)) for name in names}
    return Rule(**fields, correction=correction)


def _log_snr_steps(path: Path) -> tuple[Table, Table, Table]:
    """exp(-h) and h of the steps in lambda = log(a / s), and h of the step before over h, inf where there is none."""
    ratio = path.a * path.s_next / (path.s * path.a_next)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = -np.log(ratio)
        r = np.append(np.inf, h[:-1]) / h
    return ratio, h, np.where(np.isfinite(h), r, np.inf)


def dpmpp_1(path: Path, eta: float = 0.0) -> Rule:
    """DPM-Solver++ of order 1 (Lu et al. 2022, arXiv 2211.01095, eq. 9), which is DDIM."""
    ratio, _, _ = _log_snr_steps(path)
    return Rule(x=path.s_next / path.s, x0=path.a_next * (1 - ratio))


def dpmpp_2m(path: Path, eta: float = 0.0) -> Rule:
    """DPM-Solver++(2M): the last prediction of x_0 tells how it changes (Lu et al. 2022, algorithm 2).

    Of order 1 in the first step, in the last, to the clean end, and after one from pure noise.
    """
    ratio, _, r = _log_snr_steps(path)
    phi = path.a_next * (1 - ratio)
    return Rule(x=path.s_next / path.s, x0=phi * (1 + 0.5 / r), last=-phi * 0.5 / r)


def unipc(path: Path, eta: float = 0.0) -> Rule:
    """UniPC of order 2 with B(h) = exp(h) - 1: predicted as 2M does, and corrected by what the network then says.

    Source: Zhao et al. 2023 (arXiv 2302.04867), eqs. 5 to 8 and appendix E.4; one evaluation a step.
    """
    ratio, h, r = _log_snr_steps(path)
    phi = path.a_next * (1 - ratio)  # -a' expm1(-h); as B(h), too
    rule = Rule(x=path.s_next / path.s, x0=phi * (1 + 0.5 / r), last=-phi * 0.5 / r)
    n = len(h)
    # The correction of the x that step i - 1 led to, with the prediction there: index i, none for i = 0.
    correction = Correction(*(np.zeros(n) for _ in Correction._fields))
    correction.x[0] = 1
    for i in range(1, n):
        own = -h[i - 1]
        first = (ratio[i - 1] - 1) / own - 1 if np.isfinite(own) else -1.0
        second = first / own - 0.5 if np.isfinite(own) else -0.5
        b = np.array([first, 2 * second]) / (ratio[i - 1] - 1)
        rk = -r[i - 1]
        two = np.isfinite(rk)
        weights = np.linalg.solve([[1, 1], [rk, 1]], b) if two else np.array([0, 0.5])
        size = phi[i - 1]
        of_before, of_now = size * weights
        correction.base[i] = path.s_next[i - 1] / path.s[i - 1]
        correction.now[i] = of_now
        correction.before[i] = of_before / rk if two else 0.0
        correction.last[i] = size - of_now - correction.before[i]
    return rule._replace(correction=correction)


class Sampler(NamedTuple):
    """rule: (path, eta) -> coefficients. eta: whether it takes one. learned: whether its noise has the variance that
    the network learned. multistep: each step must begin where the last one ended. evaluations: of a step, but for the
    last. churn: whether noise can be added before a step (EDM)."""

    rule: Callable[[Path, float], Rule]
    eta: bool = False
    learned: bool = False
    multistep: bool = False
    evaluations: int = 1
    churn: bool = False


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler(ddim, eta=True),
    "ddpm": Sampler(ddpm, learned=True),
    "ddpm_large": Sampler(ddpm_large),
    "euler": Sampler(ddim, churn=True),
    "heun": Sampler(heun, multistep=True, evaluations=2, churn=True),
    "dpmpp_1": Sampler(dpmpp_1),
    "dpmpp_2m": Sampler(dpmpp_2m, multistep=True),
    "unipc": Sampler(unipc, multistep=True),
}
