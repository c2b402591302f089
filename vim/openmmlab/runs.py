"""What seg/ and det/ do with a configuration: check it, train, test, draw the prediction for one image.

The command lines are OpenMMLab's usual ones. Whatever the caller can mend is a `RunError`, before anything is built.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.utils import import_modules_from_strings

from vim.checkpoint import CheckpointError, load_checkpoint, require_fit
from vim.openmmlab import pictures


def _statistic(owner: Any, name: str) -> Any:
    """getattr for the only thing that MMEngine's checkpoints take it for."""
    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"a checkpoint asks for {name} of {owner}")
    return getattr(owner, name)


# What MMEngine's checkpoints hold beside tensors: logged values, numpy's arrays and numbers, under the names of numpy 1
# and 2, and parts of configurations.
_core = np._core if hasattr(np, "_core") else np.core
_MMENGINE_TYPES = [
    (_statistic, "builtins.getattr"),
    *[(getattr(_core.multiarray, f), f"numpy.{core}.multiarray.{f}")
      for core in ("core", "_core") for f in ("_reconstruct", "scalar")],
    *[HistoryBuffer, ConfigDict, slice, np.ndarray, np.dtype],
    *[type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"],
]  # fmt: skip


class RunError(Exception):
    """Something in the configuration or the command line that the caller can mend; the message says how."""


# ---- Command lines -------------------------------------------------------------------------------------------------


def train(argv: Sequence[str] | None, task: str) -> int:
    """`{seg,det}/train.py`. Returns the exit status; 2 for a RunError or CheckpointError, said on standard error."""
    return _main(training_parser(task), argv, task, _train)


def test(argv: Sequence[str] | None, task: str) -> int:
    """`{seg,det}/test.py`: the test set's metrics, and pictures. Exit status as `train`."""
    parser = argparse.ArgumentParser(description=f"Evaluate a checkpoint with MMEngine's runner ({task}).")
    parser.add_argument("config", help="configuration file")
    parser.add_argument("checkpoint")
    parser.add_argument("--work-dir", help="folder of the log (default output/CONFIG)")
    parser.add_argument("--show-dir", metavar="FOLDER", help="draw truth and prediction of every image there")
    if task == "seg":
        parser.add_argument(
            "--tta", action="store_true", help="several scales, each flipped too: the config's tta_pipeline"
        )
    return _main(_with_common(parser), argv, task, _test)


def infer(argv: Sequence[str] | None, task: str) -> int:
    """`{seg,det}/infer.py`: one image's prediction as an overlay. Exit status as `train`."""
    parser = argparse.ArgumentParser(description=f"Draw the prediction for an image over it ({task}).")
    parser.add_argument("image", type=Path)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a training's folder: its config, last checkpoint")
    parser.add_argument("--config", type=Path, help="configuration file, over that of --run")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint, over that of --run")
    parser.add_argument("--out", type=Path, help="PNG to write (default: IMAGE-prediction.png in this folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    if task == "det":
        parser.add_argument("--score", type=float, default=0.3, help="draw what has at least this score")
    return _main(_with_common(parser), argv, task, _infer)


def _with_common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="over the config's")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _main(parser: argparse.ArgumentParser, argv: Sequence[str] | None, task: str, command: Any) -> int:
    args = parser.parse_args(argv)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        command(args, task)
    except (RunError, CheckpointError) as error:
        print(f"{task}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(args: argparse.Namespace, task: str) -> None:
    build_training(args).train()


def training_parser(task: str) -> argparse.ArgumentParser:
    """The arguments of `{seg,det}/train.py`."""
    parser = argparse.ArgumentParser(description=f"Train with MMEngine's runner ({task}).")
    parser.add_argument("config", help="configuration file")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints (default output/CONFIG)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="go on; default: the last one")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16; needs a GPU")
    return _with_common(parser)


def build_training(args: argparse.Namespace) -> Runner:
    """The checked runner for parsed arguments of `training_parser`. Raises RunError, CheckpointError."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("output") / Path(args.config).stem)
    if args.amp:
        _use_amp(cfg)
    if args.resume:
        cfg.resume = True
        if args.resume != "auto":
            cfg.load_from = args.resume
    check_data(cfg, ("train", "val"))
    source = cfg.get("load_from") or (find_latest_checkpoint(cfg.work_dir) if cfg.resume else None)
    runner = Runner.from_cfg(cfg)
    if source is not None:
        check_weights(getattr(runner.model, "module", runner.model), source)
    return runner


def _test(args: argparse.Namespace, task: str) -> None:
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("output") / Path(args.config).stem)
    cfg.load_from = args.checkpoint
    if args.show_dir is not None:
        cfg.default_hooks.visualization.update(draw=True, interval=1)
        if task == "det":
            cfg.default_hooks.visualization.test_out_dir = str(Path(args.show_dir).resolve())
        else:
            cfg.visualizer.save_dir = args.show_dir
    if getattr(args, "tta", False):
        if "tta_pipeline" not in cfg:
            raise RunError(f"--tta needs a tta_pipeline in {args.config}, as seg/configs/_base_/ade20k.py has one")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    check_data(cfg, ("test",))
    runner = Runner.from_cfg(cfg)
    check_weights(getattr(runner.model, "module", runner.model), args.checkpoint)
    runner.test()


def _infer(args: argparse.Namespace, task: str) -> None:
    if args.run is None and (args.config is None or args.checkpoint is None):
        raise RunError("give --run FOLDER, or --config FILE and --checkpoint FILE")
    config, checkpoint = args.config or _config_of(args.run), args.checkpoint or find_latest_checkpoint(str(args.run))
    if checkpoint is None:
        raise RunError(f"no checkpoint in '{args.run}': train first, or give --checkpoint FILE")
    if not args.image.is_file():
        raise RunError(f"no image at '{args.image}'")
    model = load_model(config, checkpoint, args.cfg_options, args.device)
    out = args.out or Path(f"{args.image.stem}-prediction.png")
    pictures.draw(model, str(args.image), getattr(args, "score", 0.0)).save(out)
    print(out)


def _config_of(folder: Path) -> Path:
    """The configuration that a training saved in its folder."""
    found = sorted(folder.glob("*.py"))
    if len(found) != 1:
        raise RunError(f"'{folder}' holds {len(found)} configurations: give --config FILE")
    return found[0]


def load_model(
    config: str | Path, checkpoint: str | Path, options: Mapping[str, Any] | None = None, device: str = "cpu"
) -> torch.nn.Module:
    """A trained model in eval mode, with `cfg` and `dataset_meta`, as the frameworks' inference functions want it."""
    cfg = load_config(config, options)
    if cfg.default_scope == "mmseg":
        from mmseg.apis import init_model as build
    else:
        from mmdet.apis import init_detector as build
    cfg.model.backbone.pretrained = None  # all weights come from the checkpoint
    model = build(cfg, None, device=device)
    state = check_weights(model, checkpoint)
    model.load_state_dict(state)
    model.dataset_meta = metainfo(cfg.test_dataloader.dataset)
    return model.eval()


# ---- Checks --------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """The configuration with `options` over it, its modules imported and checked. Raises RunError."""
    if not Path(path).is_file():
        raise RunError(f"no configuration at '{path}'; there are some in seg/configs and det/configs")
    cfg = Config.fromfile(str(path))
    cfg.merge_from_dict(dict(options or {}))
    import_modules_from_strings(**cfg.get("custom_imports", {"imports": []}))
    check_classes(cfg)
    return cfg


def _use_amp(cfg: Config) -> None:
    if not torch.cuda.is_available():
        raise RunError("--amp needs a GPU: leave it out")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("dtype", "bfloat16")


def _innermost(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data set inside of wrappers such as RepeatDataset."""
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Every file and folder that the data sets of `splits` name is there. Raises RunError for the first that is not."""
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader is None:
            continue
        dataset = _innermost(loader["dataset"])
        root = Path(dataset.get("data_root") or "")
        parts = [dataset.get("ann_file") or "", *(dataset.get("data_prefix") or {}).values()]
        for path in (root, *(root / part for part in parts if part)):
            if not path.exists():
                made = "python tools/make_digit_scenes.py makes it" if "digit" in str(root) else "download it"
                raise RunError(
                    f"the data set of {split}_dataloader is not there: no '{path}'. Give its folder with --cfg-options "
                    f"{split}_dataloader.dataset.data_root=FOLDER, or {made} (see the README of the data sets)"
                )


def metainfo(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The classes and colours that a data set of a configuration has."""
    from mmengine.registry import DATASETS, DefaultScope

    dataset = _innermost(dataset)
    known = DATASETS.switch_scope_and_registry(DefaultScope.get_current_instance().scope_name)
    with known as registry:
        cls = registry.get(dataset["type"])
    return {**getattr(cls, "METAINFO", {}), **(dataset.get("metainfo") or {})}


def check_classes(cfg: Config) -> None:
    """Every head has as many classes as the training set. Raises RunError."""
    if "train_dataloader" not in cfg:
        return
    from mmengine.registry import init_default_scope

    init_default_scope(cfg.default_scope)
    classes = metainfo(cfg.train_dataloader.dataset).get("classes")
    if classes is None:
        return
    for key, count in _class_counts(cfg.model, "model"):
        if count != len(classes):
            raise RunError(
                f"{key}={count}, but the training set has {len(classes)} classes: --cfg-options {key}={len(classes)}"
            )


def _class_counts(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """(path, value) of every num_classes under a model's configuration."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, child in children:
        if key == "num_classes":
            yield f"{path}.{key}", child
        else:
            yield from _class_counts(child, f"{path}.{key}")


def check_weights(model: torch.nn.Module, source: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a runner's checkpoint, if it has every parameter of `model` in its shape.

    Raises CheckpointError that names those that are missing or mis-shaped, where MMEngine would only warn, and if the
    file is missing, truncated, or holds what can run code, for which MMEngine would fall back to unsafe loading.
    """
    # Added anew each time, and left for the runner, which will load the file again: OpenMMLab's MMEngine tells torch of
    # nothing, and the fork forgets what it told together with what was there before.
    torch.serialization.add_safe_globals(_MMENGINE_TYPES)
    checkpoint = load_checkpoint(source)
    state = checkpoint.get("state_dict", checkpoint)
    state = {name: state[name] for name in model.state_dict() if name in state}
    try:
        require_fit(model, state, source)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nGive the configuration and the options that it was trained with") from None
    return state
