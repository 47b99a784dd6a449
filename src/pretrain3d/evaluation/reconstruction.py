"""How well intensities of held-out volumes are restored, beside what needs no learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pretrain3d.evaluation.statistics import SAMPLES, interval, plain_and_drawn

NETWORK = "network"


def summarise(
    errors: Sequence[Mapping[str, float]], groups: Sequence[str], samples: int = SAMPLES
) -> dict[str, dict[str, float | None]]:
    """Errors of all cases together, with 95 % bootstrap intervals.

    Args:
        errors: per case ``{name: mean error of its patches}``, `NETWORK` and others, the same names for all.
        groups: one name per case; cases of a group (a patient) are drawn together.
        samples: of the bootstrap.

    Returns:
        ``{key: {"value", "low", "high"}}``. Key ``name``: the mean over cases. Key ``network/name``: the mean of the
        network over that of the other, drawn together: below 1 the network is better, and with its whole interval
        below 1 clearly so.
    """
    weights = plain_and_drawn(len(errors), samples, groups=groups)  # (1 + S, cases)
    means = {name: weights @ [row[name] for row in errors] / weights.sum(axis=1) for name in errors[0]}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = {f"{NETWORK}/{name}": means[NETWORK] / mean for name, mean in means.items() if name != NETWORK}
    return {key: interval(row) for key, row in {**means, **ratios}.items()}
