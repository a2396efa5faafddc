"""Training runs that are stopped and started again: each keeps its last epoch, and goes on from there."""

import json
import time
import typing


class Run(typing.NamedTuple):
    """What a run wrote into its log.

    Attributes:
        steps, evaluations: lists of dicts, in order, each step and each evaluated epoch once.
        seconds: float, of this call alone.
        resumed: bool, whether a part of it had been done before.
    """

    steps: list
    evaluations: list
    seconds: float
    resumed: bool


def train_or_go_on(chosen, data, folder):
    """Train with `gpq_tf.trainer.train`, or go on from the newest model in `folder`.

    Args:
        chosen: gpq_tf.settings.Settings; where and how often to save is decided here.
        data: what the trainer takes.
        folder: pathlib.Path, of this run alone.

    Returns:
        Run.
    """
    from gpq_tf import settings, trainer

    def epoch_of(path):
        return int(path.stem.rpartition("_")[2])

    saved = [path for path in folder.glob("*.keras") if path.stem.rpartition("_")[2].isdecimal()]
    newest = max(saved, key=epoch_of, default=None)
    start = time.time()
    if newest is None:
        trainer.train(chosen.completed({"model_save_path": str(folder), "save_term": 1, "keep": 1}), data)
    elif epoch_of(newest) < chosen.total_epochs:
        trainer.train(settings.resolve([f"--resume={newest}", f"--model_save_path={folder}"], "no config.py"), data)
    seconds = time.time() - start
    (log_file,) = folder.glob("*.log.jsonl")
    # A run that was interrupted wrote its last steps twice, the same numbers.
    log = [json.loads(line) for line in log_file.open()]
    steps = {entry["step"]: entry for entry in log if entry["event"] == "step"}
    evaluations = {entry["epoch"]: entry for entry in log if entry["event"] == "evaluation"}
    return Run(list(steps.values()), list(evaluations.values()), seconds, newest is not None)
