"""Whether config, data and method go together: names, combinations, sizes."""

from __future__ import annotations

from dataclasses import asdict

from base.base_method import BaseMethod
from base.base_trainer import parse_monitor
from data_loader import DATA_SETS
from data_loader.data_loaders import IncrementalDataLoader
from models.backbone import BACKBONES
from models.model import MODELS, check_arch
from trainer.evaluation import build_evaluators
from trainer.methods import METHODS
from trainer.optim import check_optimizer
from trainer.optional import try_optional
from utils.errors import UserError, choose, did_you_mean, listing
from utils.lr_scheduler import SCHEDULERS
from utils.machine import memory_limit
from utils.metric import EVALUATORS, METRICS
from utils.parse_config import ConfigParser

PIXEL = 13  # bytes of a crop's pixel: three colours in float32, a label


def check_names(config: ConfigParser) -> None:
    """Resolve the names of the configuration.

    Raises:
        UserError: an unknown name, an impossible combination, or a switch for which something is
            missing.
    """
    config.resolve("arch", MODELS)
    config.resolve("evaluator", EVALUATORS)
    arch = config["arch"]["args"]
    task = config["data_loader"]["args"]["task"]
    call = config.call
    given = call.resume or call.base or call.test  # weights that are no ImageNet's
    fresh = (task["step"] == 0 or task["joint"]) and not given
    pretrained = arch["backbone_pretrained"] if fresh else False
    check_arch(arch["backbone"], arch["output_stride"], arch["norm_act"], pretrained)
    args = config["data_loader"]
    known = (*DATA_SETS[args["type"]].tables, args["args"]["task"]["name"])
    for file, name in config.tasks:
        choose(f"{file}: a name in the block tasks", name, known)
    for name in config["metrics"]:
        choose("an entry of metrics", name, METRICS)
    if not config["metrics"]:
        raise UserError(f"metrics is empty; name some of {listing(METRICS)}.")
    try_optional(config)


def check_batches(config: ConfigParser) -> None:
    """Whether this machine could hold the pixels of a batch, if nothing else.

    Raises:
        UserError: it could not; Linux promises what it does not have, and kills who takes it.
    """
    limit = memory_limit()
    for kind in ("train", "val", "test"):
        where = f"data_loader.args.{kind}"
        block = config["data_loader"]["args"][kind]
        side, batch = block["args"]["transform_args"]["crop_size"], block["batch_size"]
        needed = PIXEL * batch * side**2
        if block["args"]["transform"] and limit is not None and needed > limit:
            raise UserError(
                f"a batch of {batch} crops of {side}×{side} pixels has {needed / 2**30:,.1f} GiB, "
                f"but this machine gives {limit / 2**30:,.1f}; lower {where}.batch_size or "
                f"{where}.args.transform_args.crop_size."
            )


def with_settings(config: ConfigParser) -> ConfigParser:
    """The configuration with every setting of the method; what nobody chose has its default.

    Raises:
        UserError: an unknown method, or a setting that it does not have or that is out of range.
    """
    name = choose("method", config["method"], METHODS)
    kind, given = METHODS[name].Settings, dict(config["hyperparameter"])
    for setting in given.keys() - kind.rules().keys():
        if f"hyperparameter.{setting}" in config.beside:
            del given[setting]
            continue
        others = [other for other in METHODS if setting in METHODS[other].Settings.rules()]
        whose = f", but of {listing(others)}" if others else did_you_mean(setting, kind.rules())
        raise UserError(
            f"hyperparameter.{setting} is no setting of '{name}'{whose}; valid: "
            f"{listing(kind.rules()) or 'none'}."
        )
    settings = asdict(kind.read(given))
    return config.with_values({"hyperparameter": settings})


def check_training(config: ConfigParser, data: IncrementalDataLoader, method: BaseMethod) -> None:
    """Settings that only training needs; weights of another version may be evaluated without them.

    Raises:
        UserError: values that are impossible, or that do not go together.
    """
    check_optimizer(config)
    config.resolve("lr_scheduler", SCHEDULERS)
    _check_method(config, method)
    if data.saliency is not None:
        data.saliency.check()
    trainer = config["trainer"]
    if trainer["early_stop"] > 0 and trainer["monitor"] == "off":
        raise UserError("trainer.early_stop needs trainer.monitor, which is off; name a metric.")
    if data.norm_batch == 1 and not config["arch"]["args"]["freeze_all_bn"]:
        raise UserError(
            "data_loader.args.train.batch_size (--batch_size) is 1, but BatchNorm cannot learn "
            "from one image, which leaves the pooled branch of the ASPP one value per channel; use "
            "at least 2, or --freeze_bn."
        )
    data.check_mix()
    images = len(data.source["train"])
    if images < data.global_batch:
        raise UserError(
            f"the data set has {images} training images, fewer than one batch: "
            f"{data.batch_text()}; choose a smaller one."
        )
    _, validation = build_evaluators(config, data.task)
    parse_monitor(trainer["monitor"], [f"val_{name}" for name in validation.names()])


def _check_method(config: ConfigParser, method: BaseMethod) -> None:
    """Whether method, memory, saliency maps and backbone go together.

    Raises:
        UserError: one is given that the method does not use, or it needs one that is not there.
    """
    name, args = config["method"], config["data_loader"]["args"]
    if args["memory"]["mem_size"] > 0 and method.replay_confidence is None:
        others = [key for key, kind in METHODS.items() if kind.replay_confidence is not None]
        raise UserError(
            f"method '{name}' has no replay memory; set data_loader.args.memory.mem_size "
            f"(--mem_size) to 0, or choose one of {listing(others)}."
        )
    if args["memory"]["mem_size"] > 0 and method.task.joint:
        raise UserError(
            "joint training (--joint) has no old classes to replay; set "
            "data_loader.args.memory.mem_size (--mem_size) to 0."
        )
    if args["saliency_dir"] is not None and not method.reads_saliency:
        raise UserError(
            f"method '{name}' with these settings reads no saliency maps; leave "
            "data_loader.args.saliency_dir (--saliency_dir) null."
        )
    if args["saliency_dir"] is None and method.reads_saliency:
        raise UserError(
            f"method '{name}' with these settings reads a saliency map of every training image, "
            "but data_loader.args.saliency_dir is null; name their folder with --saliency_dir, or "
            f"see --method {name} --help for the setting that does without."
        )
    backbone = config["arch"]["args"]["backbone"]
    if "stages" in method.wants and not BACKBONES[backbone].stages:
        others = [key for key, spec in BACKBONES.items() if spec.stages]
        raise UserError(
            f"method '{name}' compares the maps of a backbone's stages, but arch.args.backbone "
            f"'{backbone}' has none; choose one of {listing(others)}."
        )
