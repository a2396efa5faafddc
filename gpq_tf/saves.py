"""The models of one training run: what was saved last, which is the best, and which are too many."""

from pathlib import Path

from gpq_tf import model_file
from gpq_tf import settings as settings_module
from gpq_tf.files import remove_abandoned


def newest(stem):
    """Paths of all saves, the newest first: another run's of more epochs may lie in the folder.

    Args:
        stem: Path, folder and beginning of the names.
    """
    stopped, numbered = _stopped_path(stem), _by_epoch(stem)
    candidates = [*(numbered[epoch] for epoch in sorted(numbered)), stopped]
    # Of those that a copy has made equally old, the last.
    candidates = [path for path in reversed(candidates) if path.is_file()]
    return sorted(candidates, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def find_last(stem, report=None):
    """Path of the newest save that is whole, or None where there is none.

    Args:
        stem: Path, folder and beginning of the names.
        report: callable(str), told of damaged files that are passed over, or None.

    Raises:
        ValueError: if there are saves, and all are damaged.
    """
    candidates = newest(stem)
    for path in candidates:
        try:
            model_file.read(path)
        except ValueError as error:
            if path == candidates[-1]:
                raise
            if report:
                report(f"passed over: {error}")
        else:
            return path
    return None


def _stopped_path(stem):
    """Where a run is saved that ends before its time."""
    return Path(f"{stem}_stopped.keras")


def _by_epoch(stem):
    """dict of epoch -> Path, of all models <stem>_<epoch>.keras."""
    paths = {path.stem.removeprefix(f"{stem.name}_"): path for path in stem.parent.glob(f"{stem.name}_*.keras")}
    return {int(epoch): path for epoch, path in paths.items() if epoch.isdecimal()}


class Saves:
    """Saves a run's models as <stem>_<epoch>.keras and <stem>_best.keras, with their settings as .json beside them.

    Args:
        stem: Path, folder and beginning of the names.
        settings: gpq_tf.settings.Settings; `keep` says how many epochs' models stay, `resume` whose run goes on.
        score: str, name of what the best model has the highest of, in its record: "mAP".
        epoch_of_resume: int, epochs that the resumed run has behind it.
        report: callable(str), told what a user should know.

    Attributes:
        last_good: Path of the newest model of the run, or None.
        best: dict, epoch and score of the best model that was evaluated; None and -1.0 before.
    """

    def __init__(self, stem, settings, score, epoch_of_resume, report):
        self._stem, self._settings, self._score = stem, settings, score
        remove_abandoned(stem)
        by_epoch = _by_epoch(stem)
        earlier = [by_epoch[epoch] for epoch in sorted(by_epoch) if epoch <= epoch_of_resume]
        # A resumed run goes on with its own saves; a new one has none, whatever lies in the folder.
        self._paths = earlier if settings.resume else []
        self.last_good = Path(settings.resume) if settings.resume else None
        self.best = {"epoch": None, score: -1.0}
        if settings.resume and self._best_path.exists():
            record = model_file.read(self._best_path).record
            # A best model of later epochs belongs to a run that went on from here before; one without a score, to none.
            if score in record and record.get("epoch", epoch_of_resume + 1) <= epoch_of_resume:
                self.best = {name: record[name] for name in self.best}
        self._owns_stopped = bool(self.last_good) and self.last_good.resolve() == _stopped_path(stem).resolve()
        others = len(by_epoch) - len(self._paths)
        if others:
            report(f"{stem.parent} holds {others} models of another run: those of the same epochs will be replaced")
        if self.best["epoch"] is None and self._best_path.exists():
            report(f"{self._best_path} is the best model of another run: this one's first evaluation will replace it")
        if not self._owns_stopped and _stopped_path(stem).exists():
            report(f"{_stopped_path(stem)} is the save of another run: this one's will replace it where it is stopped")

    @property
    def newest(self):
        """Path of the newest model of the run, the best if there is no other, or None."""
        return self.last_good or (self._best_path if self.best["epoch"] is not None else None)

    @property
    def _best_path(self):
        return Path(f"{self._stem}_best.keras")

    def save(self, model, epoch):
        """Save the model of an epoch, delete what is too old, return the path."""
        path, watched = Path(f"{self._stem}_{epoch}.keras"), f"{self._score}_of_subset"
        model.save(path)
        about = {"epoch": epoch, watched: model.record[watched]}
        settings_module.save(self._settings, path.with_suffix(".json"), **about)
        self.last_good = path
        self._paths.append(path)
        if self._owns_stopped:
            _stopped_path(self._stem).unlink(missing_ok=True)
        while self._settings.keep is not None and len(self._paths) > self._settings.keep:
            oldest = self._paths.pop(0)
            oldest.unlink(missing_ok=True)
            oldest.with_suffix(".json").unlink(missing_ok=True)
        return path

    def save_stopped(self, model):
        """Save the model of a run that ends before its time, until the next save; return the path."""
        path = _stopped_path(self._stem)
        model.save(path)
        self.last_good, self._owns_stopped = path, True
        return path

    def save_if_best(self, model):
        """Save a model whose record holds a higher score than all before; return the path, or None."""
        if not model.record[self._score] > self.best[self._score]:
            return None
        self.best = {name: model.record[name] for name in self.best}
        model.save(self._best_path)
        settings_module.save(self._settings, self._best_path.with_suffix(".json"), **self.best)
        return self._best_path
