"""The Hydra application: its sweeper makes the points, its launcher runs them."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from sharebasis.errors import GitError, ShareBasisError, SweepError
from sharebasis.pipeline import ledger
from sharebasis.pipeline.paths import RESULTS
from sharebasis.stages.report.experiments import collect
from sharebasis.stages.report.points import write_points
from sharebasis.sweep.points import expand, find_points
from sharebasis.sweep.run import Sweep, run_common, run_point
from sharebasis.sweep.watch import Watch, show
from sharebasis.sweep.workspace import find_repository

log = logging.getLogger(__name__)


OmegaConf.register_new_resolver(
    "cores_for", lambda jobs: max(1, (os.cpu_count() or 1) // max(1, int(jobs))), replace=True
)


class Sweeping(Callback):
    """What comes before the first point and after the last."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send callbacks along with every point, but the watch stays here

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take the snapshot, find the points, run what they have in common."""
        try:
            self._start(config)
        except ShareBasisError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        except Exception:  # which Hydra would turn into a warning, and go on
            sys.exit(traceback.format_exc())

    def _start(self, config: DictConfig) -> None:
        hydra_config = config.hydra
        root = Path(hydra_config.runtime.cwd)
        swept = [
            f"{key}={value}" for key, value in (hydra_config.sweeper.get("params") or {}).items()
        ]
        grid = expand([*swept, *hydra_config.overrides.task])
        repository = find_repository(root)
        points = find_points(repository.pipeline, hydra_config.job.name, grid)
        sweep = Sweep(
            hydra_config.job.name, root / hydra_config.sweep.dir, repository, tuple(points)
        )
        sweep.save()
        self.watch = Watch(sweep.ledger, len(points))
        self.watch.start()
        for point in sweep.units.values():
            with suppress(SweepError, GitError):  # it is the error of every point that needs this
                run_common(sweep, point)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say how it went; the status is 1 if a point has failed."""
        account = self.watch.stop()
        show(account, self.watch.seconds)
        done = [name for name, event in account.points.items() if event["state"] != "failed"]
        if done:  # experiments may be collected by git; what they measured stays
            root = Path(config.hydra.runtime.cwd)
            path = write_points(config.hydra.job.name, collect(done, root), root / RESULTS)
            log.info("What they measured: %s; dvc repro report draws it.", path.relative_to(root))
        ended = {"state": "done", "seconds": ledger.process_age() or self.watch.seconds}
        ledger.record(self.watch.path, what="sweep", name=config.hydra.job.name, **ended)
        if account.failed:
            sys.exit(f"{len(account.failed)} of {len(account.points)} points have failed.")


def run(config: DictConfig) -> None:
    """One point, in whatever process the launcher has made for it."""
    hydra_config = HydraConfig.get()
    sweep = Sweep.load(Path(hydra_config.runtime.cwd) / hydra_config.sweep.dir)
    run_point(sweep, sweep.point(list(hydra_config.overrides.task)))


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("sharebasis").setLevel(logging.INFO)
    hydra.main(config_path=str(Path("conf").absolute()), config_name="sweep", version_base=None)(
        run
    )()
