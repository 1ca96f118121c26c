"""Are DEAM's labels swapped? The static ones against the means of those over time."""

import numpy as np

from kit.cli import UserError
from kit.deam import dynamic_means

RANGES = ((1, 1000), (1001, 2000))  # the songs of 2013 and 2014


def audit_labels(deam):
    """Compare a DEAMHandler's static labels with the song means of its dynamic ones. One dict a
    range: low, high, songs, r (2×2: static valence, arousal × dynamic valence, arousal), evidence:
    mean correlation crosswise minus straight, its 99.9% bootstrap interval over songs, and
    swapped: True, False, or None where the interval holds 0. Raises UserError where there is
    nothing to compare with."""
    if len(deam.dynamic) < 2:
        raise UserError(f"no dynamic annotations in {deam.root} to compare with: unpack the whole "
                        "of DEAM_Annotations there")
    valence, arousal = (dynamic_means(deam.dynamic[name]) for name in ("valence", "arousal"))
    rows, generator = [], np.random.default_rng(0)
    for low, high in RANGES:
        values = np.array([[labels.valence, labels.arousal, valence[song], arousal[song]]
                           for song, labels in deam.annotations.items()
                           if low <= song <= high and song in valence and song in arousal])
        if len(values) < 10:
            continue
        drawn = generator.integers(0, len(values), (4000, len(values)))
        resampled = np.concatenate([evidence(correlations(values[part]))
                                    for part in np.array_split(drawn, 20)])
        interval = np.quantile(resampled, [0.0005, 0.9995])
        swapped = True if interval[0] > 0 else False if interval[1] < 0 else None
        r = correlations(values)
        rows.append({"low": low, "high": high, "songs": len(values), "r": r,
                     "evidence": float(evidence(r)), "interval": interval.tolist(),
                     "swapped": swapped})
    return rows


def correlations(values):
    """values[..., N, 4] (static valence, arousal, dynamic valence, arousal) → r[..., 2, 2]."""
    z = values - values.mean(-2, keepdims=True)
    z = z / np.maximum(np.sqrt((z * z).mean(-2, keepdims=True)), 1e-12)  # 0 of a constant
    return np.swapaxes(z[..., :2], -1, -2) @ z[..., 2:] / values.shape[-2]


def evidence(r):
    """How much better the labels fit crosswise than straight, from r[..., 2, 2]."""
    return (r[..., 0, 1] + r[..., 1, 0] - r[..., 0, 0] - r[..., 1, 1]) / 2


def swapped_ranges(deam):
    """[[lowest, highest id], …] whose valence and arousal the audit finds swapped; None where there
    is nothing to compare with."""
    try:
        rows = audit_labels(deam)
        if all(row["swapped"] is None for row in rows):
            raise UserError("the data do not tell whether they are swapped")
    except UserError as error:
        print(f"the labels cannot be audited ({error}); --labels corrected will not be possible")
        return None
    for row in rows:
        if row["swapped"] is None:
            print(f"ids {row['low']}–{row['high']}: the data do not tell whether their labels are "
                  "swapped; --labels corrected will leave them as they are")
    return [[row["low"], row["high"]] for row in rows if row["swapped"]]
