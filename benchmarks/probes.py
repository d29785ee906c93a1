"""Probes on every layer of a 14 B model: 48 layers x 5,120 features x 20,000 rows, with controls, on this machine.

    OMP_NUM_THREADS=2 python benchmarks/probes.py

Timed is ``evaluate_layers``: a split grouped by prompt, repeated, class-balanced, with shuffled labels (fitted in every
layer), random coordinates and the prompt-only ceiling (computed once, inside the timer). 48 layers are 19 GB, so two
tables, made before the timer starts, take turns.

* ``MeanDifferenceProbe``, 20 repeats;
* ``LogisticProbe`` (L2, C = 0.01), 5 repeats, stopped after 10 iterations: *not* the exact solution on such features;
* one fit of ``LogisticProbe`` to the tolerance of scikit-learn, beside its own StandardScaler and LogisticRegression.
rows.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from mechmisalign.probes import LogisticProbe, MeanDifferenceProbe, evaluate_layers, logistic
from mechmisalign.probes.estimators import linear_weights
from mechmisalign.store import environment, write_json

RESULTS = Path(__file__).parent / "results"


def residuals(labels: np.ndarray, prompts: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Rows with a few strong common directions, an offset, a trace of their prompt, and a faint sign of their class."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(labels), width, generator=generator)
    spectrum = 8 / torch.arange(1, 65).sqrt()
    table += (
        (torch.randn(len(labels), 64, generator=generator) * spectrum) @ torch.randn(64, width, generator=generator) / 8
    )
    table += torch.randn(int(prompts.max()) + 1, width, generator=generator)[torch.from_numpy(prompts)] / 4
    table += torch.from_numpy(labels.astype(np.float32))[:, None] * torch.randn(width, generator=generator) / 16
    return (table + 3 * torch.randn(width, generator=generator)).numpy()


def timed_layers(tables: list[np.ndarray], layers: int, **options: Any) -> dict[str, Any]:
    marks = [time.perf_counter()]

    def stream() -> Iterator[tuple[int, np.ndarray]]:
        for layer in range(layers):
            yield layer, tables[layer % len(tables)]
            marks.append(time.perf_counter())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        frame = evaluate_layers(stream, **options)
    per_layer = np.diff(marks)
    auroc = frame[frame["metric"] == "auroc"].groupby("series")["score"].mean()
    return {
        "probe": repr(options["probe"]), "repeats": options["repeats"], "layers": layers,
        "seconds in all": round(float(per_layer.sum()), 2),
        "seconds per layer": {"first, with the controls made once": round(float(per_layer[0]), 3),
                              "median": round(float(np.median(per_layer)), 3),
                              "slowest": round(float(per_layer.max()), 3)},
        "solves stopped early": f"{len(caught)} of {layers + 1}",
        "auroc": {series: round(float(score), 3) for series, score in auroc.items()},
    }  # fmt: skip


def one_fit(table: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """One fit on all rows: ours, and scikit-learn's at its default tolerance."""
    start = time.perf_counter()
    ours = LogisticProbe(max_iter=500).fit(table, labels)
    middle = time.perf_counter()
    theirs = logistic().fit(table, labels)
    end = time.perf_counter()
    margins = (linear_weights(probe).margins(table)[0] for probe in (ours, theirs))
    return {
        "LogisticProbe, seconds": round(middle - start, 3),
        "scikit-learn, seconds": round(end - middle, 3),
        "scikit-learn / LogisticProbe": round((end - middle) / (middle - start), 2),
        "correlation of decision values": round(float(np.corrcoef(*margins)[0, 1]), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)  # two threads that share their cores with another process wait for each other
    prompts = np.arange(options.rows) % options.prompts
    labels = np.random.default_rng(0).random(options.rows) < 0.5
    tables = [residuals(labels, prompts, options.width, seed) for seed in (0, 1)]
    data = {"labels": labels, "groups": prompts}
    results = [
        timed_layers(tables, options.layers, probe=MeanDifferenceProbe(), repeats=20, **data),
        timed_layers(tables, options.layers, probe=LogisticProbe(max_iter=10), repeats=5, **data),
    ]
    single = one_fit(tables[0], labels)
    for result in (*results, single):
        print(result)
    report = {"date": time.strftime("%Y-%m-%d"), **environment(), "threads": torch.get_num_threads()}
    report |= {"load before": load, **vars(options)}
    write_json(RESULTS / "probes.json", {**report, "layers timed": results, "one fit": single})


if __name__ == "__main__":
    main()
