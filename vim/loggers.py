"""Where a run's numbers go besides log.txt: TensorBoard, Weights & Biases, MLflow. Each only if asked for."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vim.checkpoint import CheckpointError
from vim.config import ConfigError

Write = Callable[[Mapping[str, float], int], object]


class Loggers:
    """Those that the flags ask for; nothing on other processes than the main one. A context: closes them.

    Raises ConfigError for one that is asked for and not installed, CheckpointError where TensorBoard cannot write.
    """

    def __init__(self, args: argparse.Namespace, first_step: int, is_main: bool) -> None:
        self._writers: list[Write] = []
        self._open = ExitStack()
        asked = (
            (args.tensorboard, "--tensorboard", "torch.utils.tensorboard", "tensorboard", self._tensorboard),
            (args.log_wandb, "--log-wandb", "wandb", "wandb", self._wandb),
            (args.log_mlflow, "--log-mlflow", "mlflow", "mlflow", self._mlflow),
        )
        modules = [(start, _require(module, flag, package)) for wanted, flag, module, package, start in asked if wanted]
        if is_main:  # the others only make sure that all processes fail alike
            self._writers = [start(module, args, first_step) for start, module in modules]

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self._open.__exit__(kind, error, traceback)
        except CheckpointError as problem:
            if error is None:
                raise
            print(problem, file=sys.stderr)  # what ended the run matters more

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """The numbers among `values`, at update `step` of the run."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for write in self._writers:
            write(numbers, step)

    def _tensorboard(self, tensorboard: ModuleType, args: argparse.Namespace, first_step: int) -> Write:
        folder = Path(args.output_dir, "tensorboard")
        with _can_write(folder):
            writer = tensorboard.SummaryWriter(str(folder), purge_step=first_step)

        @self._open.callback
        def close() -> None:
            with _can_write(folder):
                writer.close()

        def write(numbers: Mapping[str, float], step: int) -> None:
            with _can_write(folder):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)

        return write

    def _wandb(self, wandb: ModuleType, args: argparse.Namespace, _: int) -> Write:
        run = wandb.init(project=args.project, name=_run_name(args), dir=args.output_dir or None, config=vars(args))
        self._open.callback(run.finish)
        return lambda numbers, step: run.log(dict(numbers), step=step)

    def _mlflow(self, mlflow: ModuleType, args: argparse.Namespace, _: int) -> Write:
        mlflow.set_experiment(args.project)
        mlflow.start_run(run_name=_run_name(args))
        self._open.callback(mlflow.end_run)
        mlflow.log_params(vars(args))
        return lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step)


@contextmanager
def _can_write(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {folder} (--tensorboard): {error.strerror or error}") from error


def _require(module: str, flag: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{flag} needs a package that is not installed: pip install {package} ({error})") from error


def _run_name(args: argparse.Namespace) -> str | None:
    return Path(args.output_dir).resolve().name if args.output_dir else None
