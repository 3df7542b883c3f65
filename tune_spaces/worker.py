"""What Ray Tune calls for a trial, in a process of Ray's.

A run of one worker trains in this very process, which Tune hands to one trial after another: imports and the start of
Ray's process, longer than a small run, are paid once. Runs of several workers are Ray Train runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from data_prep.errors import UserError
from dbd_dist.runtime.stopping import Stopped
from tune_spaces.attack import craft_and_train
from tune_spaces.trial import train


def trial(config: dict[str, Any], *, job: Mapping[str, Any]) -> None:
    """What Tune calls. Reports "outcome" once, as JSON: "status" (finished, failed, interrupted) and what
    `book` says of a row; before that, with early stopping, "epoch" and "value" where the metric was measured.

    Args:
        config: "number" and "values" (JSON).
        job: see `sweep.job_of`.
    """
    from ray import tune

    sys.argv[:] = job["command"]  # what run.json and locks record
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray leaves it at the trial's CPUs; a run sets torch's threads itself
    number, values = config["number"], json.loads(config["values"])
    try:
        if job["attacks"]:
            outcome = craft_and_train(number, values, job)
        else:
            outcome = train(number, values, job)
    except Stopped:
        outcome = {"status": "interrupted"}
    except UserError as error:  # another try would end alike
        outcome = {"status": "failed", "message": str(error)}
    tune.report({"outcome": json.dumps(outcome)})
