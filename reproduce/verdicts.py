"""What counts as holding: comparisons of results, each of which returns (what was found, a verdict)."""

import itertools
from collections.abc import Iterable

HOLDS, FAILS, UNCLEAR = "holds", "does not hold", "cannot be told at this size"


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """The mean over the seeds, and their range."""
    found = list(values)
    mean, low, high = (f"{value:{form}}" for value in (sum(found) / len(found), min(found), max(found)))
    return mean if len(found) == 1 else f"{mean} ({low} to {high})"


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of a claim with several parts."""
    return max(verdicts, key=(HOLDS, UNCLEAR, FAILS).index)


def in_order(groups: dict[str, list[float]], form: str = ".3f", error: float = 0.0) -> tuple[str, str]:
    """
    Whether each group lies below the next one: holds if all of its seeds are below all of the next one's, fails if all
    are above in some pair of neighbours.

    :param groups: {label: a value for each seed}, lowest first as claimed.
    :param error: of a ratio of two values, which a difference has to exceed.
    """
    values = list(groups.values())
    pairs = list(itertools.pairwise(values))
    found = ", ".join(f"{label} {spread(group, form)}" for label, group in groups.items())
    if all(max(low) * (1 + error) < min(high) for low, high in pairs):
        return found, HOLDS
    return found, FAILS if any(min(low) > max(high) * (1 + error) for low, high in pairs) else UNCLEAR


def about_equal(groups: dict[str, list[float]], share: float, form: str = ".3f") -> tuple[str, str]:
    """Whether the second group's mean is at most `share` above the first's. Unclear if only some of the seeds are."""
    reference, other = groups.values()
    found = ", ".join(f"{label} {spread(group, form)}" for label, group in groups.items())
    if sum(other) / len(other) <= (1 + share) * sum(reference) / len(reference):
        return found, HOLDS
    return found, FAILS if min(other) > (1 + share) * max(reference) else UNCLEAR


def clear(found: str, margin: float, error: float = 0.0) -> tuple[str, str]:
    """Whether the margin by which a claim holds is above an error, or below its negative. 0 for arithmetic."""
    return found, HOLDS if margin > error else FAILS if margin < -error or not error else UNCLEAR
