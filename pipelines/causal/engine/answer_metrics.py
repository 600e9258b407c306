"""In: logits. Out: one figure of the answer, as patching measures it: a logit difference, a probability, a divergence.

Figures are float64, of logits (…, vocabulary), and have gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from actstore.errors import InputError
from pipelines.metrics.divergence import divergence, log_probabilities, probabilities

Figure = Callable[[Tensor], Tensor]
"""Logits (…, vocabulary) to one figure each (…)."""
METRICS = ("logit_difference", "log_probability", "probability", "kl")
MIN_DIFFERENCE = 0.1
"""Least difference between the logit differences of two runs that is divided by."""


@dataclass(frozen=True)
class Metric:
    """A figure of logits, what it means, and its value in the clean and in the corrupt run.

    Without a corrupt run `corrupt` is None, and the figure is the change from the clean run.
    """

    name: str
    unit: str
    of: Figure
    clean: float
    corrupt: float | None


def logit_difference_of(target: int, against: int) -> Figure:
    """The logit of one token less that of another."""
    return lambda scores: scores[..., target].double() - scores[..., against].double()


def log_probability_of(target: int) -> Figure:
    """A token's log-probability, in nats."""
    return lambda scores: log_probabilities(scores)[..., target]


def probability_of(target: int) -> Figure:
    """A token's probability."""
    return lambda scores: probabilities(scores)[..., target]


class Divergence:
    """KL(reference ‖ ·) in nats, from the logits (vocabulary,) of the reference; never below 0 by rounding.

    At the reference it is exactly 0, its least, and its gradient there is zero.
    """

    def __init__(self, reference: Tensor):
        self.fixed = log_probabilities(reference.detach())

    def __call__(self, scores: Tensor) -> Tensor:
        return divergence(self.fixed, log_probabilities(scores))


def pair_metric(name: str, clean: Tensor, corrupt: Tensor, target: int, against: int) -> Metric:
    """A metric of patching between two runs, from their logits (vocabulary,) where it is measured.

    `logit_difference`: (patched − corrupt) / (clean − corrupt) of the target's logit less that of `against`: 1 as in the
    clean run, 0 as in the corrupt one. `kl`: KL(clean ‖ patched). The others are figures of the target as they are. Raises
    InputError where the two logit differences are less than 0.1 apart: the quotient would be noise.
    """
    require_metric(name)
    if name == "logit_difference":
        figure = logit_difference_of(target, against)
        first, last = float(figure(clean)), float(figure(corrupt))
        if abs(first - last) < MIN_DIFFERENCE:
            raise InputError(
                f"the logit difference of the answers is {first:.3f} in the clean and {last:.3f} in the corrupt run, less "
                f"than {MIN_DIFFERENCE} apart, too little to divide by; choose other answers, prompts, or another metric."
            )
        unit = "(patched - corrupt) / (clean - corrupt) of the logit difference"
        return Metric(name, unit, lambda scores: (figure(scores) - last) / (first - last), 1.0, 0.0)
    figure, unit = _figure(name, clean, target)
    return Metric(name, unit, figure, float(figure(clean)), float(figure(corrupt)))


def change_metric(name: str, clean: Tensor, target: int, against: int | None) -> Metric:
    """A metric of an intervention in one run: the change that it brings to a figure, from the run's logits (vocabulary,)."""
    require_metric(name)
    if name == "kl":  # as it is: a change from 0, and known to `require_slope` as what has no gradient here
        figure, unit = _figure(name, clean, target)
        return Metric(name, unit, figure, 0.0, None)
    if name == "logit_difference":
        if against is None:
            raise InputError(
                "metric logit_difference: needs a second token; name it with --against, or take log_probability."
            )
        figure, unit = logit_difference_of(target, against), "change of the logit difference"
    else:
        figure, unit = _figure(name, clean, target)
        unit = f"change of the {unit}"
    before = float(figure(clean))
    return Metric(name, unit, lambda scores: figure(scores) - before, 0.0, None)


def require_metric(name: str) -> None:
    """Raises InputError for a name that is none of `METRICS`."""
    if name not in METRICS:
        raise InputError(f"metric {name!r}: known are {', '.join(METRICS)}.")


def _figure(name: str, clean: Tensor, target: int) -> tuple[Figure, str]:
    if name == "kl":
        return Divergence(clean), "KL(clean || patched) in nats"
    if name == "probability":
        return probability_of(target), "probability of the target"
    return log_probability_of(target), "log-probability of the target in nats"
