"""The catalogue of papers and one executable claim for each.

>>> from gossamer.papers import paper
>>> paper("wanda").room
'pruning'
"""

from __future__ import annotations

from gossamer.papers.catalogue import ROOMS, Paper, paper, papers
from gossamer.papers.experiment import (
    Experiment,
    Observation,
    experiments,
    find_experiment,
    reproduce,
    run_experiment,
)
from gossamer.papers.results import Result, Verdict, load_result, results_directory, rows, stored_result
from gossamer.papers.statistics import Interval, bootstrap_interval, mean_interval, paired_difference

__all__ = [
    "ROOMS",
    "Experiment",
    "Interval",
    "Observation",
    "Paper",
    "Result",
    "Verdict",
    "bootstrap_interval",
    "experiments",
    "find_experiment",
    "load_result",
    "mean_interval",
    "paired_difference",
    "paper",
    "papers",
    "reproduce",
    "results_directory",
    "rows",
    "run_experiment",
    "stored_result",
]
