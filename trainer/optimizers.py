"""The optimizers by name: the library that runs each, its arguments with their limits, and how files spell it.

A name in a file only selects an entry of this table: nothing that a file names is imported.  Does not own how an
optimizer is made (``trainer.loop.optimizers``).  Never imports torch.

Libraries are those that sd-scripts uses, so that a file gives the same updates: torch, bitsandbytes, transformers
(Adafactor), prodigyopt, lion-pytorch, schedulefree, dadaptation, came-pytorch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.arguments import FLAG, NUMBER, PAIR, TRIPLE, WHOLE, Argument, as_entries, check_arguments, parse
from trainer.errors import MachineError

# Arguments, with the defaults of the libraries

BETAS = Argument(PAIR, (0.9, 0.999), low=0, high=1, high_is_excluded=True)
LION_BETAS = Argument(PAIR, (0.9, 0.99), low=0, high=1, high_is_excluded=True)
EPS = Argument(NUMBER, 1e-8, low=0, high=1)
SOME_EPS = Argument(NUMBER, 1e-8, low=0, high=1, low_is_excluded=True)
OFF = Argument(FLAG, False)
NEVER = Argument(FLAG, False, choices=(False,))  # the library has the argument, but not the feature
BITS = Argument(WHOLE, 32, choices=(32,))
MIN_8BIT_SIZE = Argument(WHOLE, 4096, low=0, high=2**62)
MOMENTUM = Argument(NUMBER, 0.0, low=0, high=1, high_is_excluded=True)
NESTEROV_MOMENTUM = Argument(NUMBER, 0.9, low=0, high=1, low_is_excluded=True, high_is_excluded=True)
D0 = Argument(NUMBER, 1e-6, low=0, high=1, low_is_excluded=True)
GROWTH_RATE = Argument(NUMBER, None, low=1, high=1e30, can_be_none=True)  # None: not limited
CLIP_THRESHOLD = Argument(NUMBER, 1.0, low=0, high=1e6, low_is_excluded=True)

_ADAM = {"betas": BETAS, "eps": EPS}
# One kernel for all weights on a GPU, one call on a CPU; the numbers are the same up to fp32's rounding.  A checkpoint
# that was begun without goes on without: the choice is part of the optimizer's state.
_FUSED = {"fused": True}
_TORCH_ADAM = {**_ADAM, "amsgrad": OFF, "maximize": NEVER}
_BNB_ADAM = {
    **_ADAM,
    "amsgrad": NEVER,
    "optim_bits": BITS,
    "min_8bit_size": MIN_8BIT_SIZE,
    "is_paged": NEVER,
}
_BNB_LION = {"betas": LION_BETAS, "min_8bit_size": MIN_8BIT_SIZE, "is_paged": NEVER}
_EMA_MIX = {
    "betas": Argument(TRIPLE, (0.9, 0.999, 0.9999), low=0, high=1, high_is_excluded=True),
    "alpha": Argument(NUMBER, 5.0, low=0, high=1e6),
    "t_alpha": Argument(WHOLE, None, low=1, high=1e9, can_be_none=True),
    "t_beta3": Argument(WHOLE, None, low=1, high=1e9, can_be_none=True),
    "eps": EPS,
    "min_8bit_size": MIN_8BIT_SIZE,
}
_SGD = {
    "momentum": MOMENTUM,
    "dampening": Argument(NUMBER, 0.0, low=0, high=1),
    "nesterov": OFF,
    "maximize": NEVER,
}
_D_ADAPT = {"d0": D0, "growth_rate": GROWTH_RATE, "log_every": Argument(WHOLE, 0, choices=(0,))}
_ADAN = {
    "betas": Argument(TRIPLE, (0.98, 0.92, 0.99), low=0, high=1, high_is_excluded=True),
    "eps": SOME_EPS,
    "no_prox": OFF,
    **_D_ADAPT,
}
_SCHEDULE_FREE = {
    "r": Argument(NUMBER, 0.0, low=0, high=100),
    "weight_lr_power": Argument(NUMBER, 2.0, low=0, high=100),
}
_FREE_BETAS = Argument(PAIR, (0.9, 0.999), low=0, high=1, low_is_excluded=True, high_is_excluded=True)
_WARM_UP = {"warmup_steps": Argument(WHOLE, 0, low=0, high=1e9)}
# Arguments that change speed or memory, never the update; a file may give them, and they are left out.
ONLY_SPEED = ("foreach", "fused", "capturable", "differentiable", "use_triton", "fsdp_in_use")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer.

    ``package`` is its name for pip, ``where`` module and class, ``full_name`` the class as Python names it, which
    sd-scripts writes into a LoRA. ``weight_decay`` is the library's default, ``ours``
    the arguments that this tool gives unless others are set. With ``one_rate`` the library ends the run if
    parameter groups have different rates above 0 (it says so itself).
    """

    package: str
    where: str
    full_name: str
    arguments: Mapping[str, Argument]
    weight_decay: float = 0.0
    ours: Mapping[str, Any] = field(default_factory=dict)
    one_rate: bool = False
    is_schedule_free: bool = False
    spellings: tuple[str, ...] = ()  # full class names, as optimizer_type of sd-scripts can have them


def _bnb(name: str, arguments: Mapping[str, Argument], module: str, decay: float) -> Optimizer:
    spellings = (f"bitsandbytes.optim.{name}", f"bitsandbytes.optim.{module}.{name}", f"bnb.optim.{name}")
    where, full_name = f"bitsandbytes.optim:{name}", spellings[1]
    return Optimizer("bitsandbytes", where, full_name, arguments, decay, spellings=spellings)


def _torch(name: str, arguments: Mapping[str, Argument], decay: float = 0.0, **more: Any) -> Optimizer:
    spellings = (f"torch.optim.{name}", f"torch.optim.{name.lower()}.{name}")
    where, full_name = f"torch.optim:{name}", spellings[1]
    return Optimizer("torch", where, full_name, arguments, decay, spellings=spellings, **more)


def _d_adapt(
    name: str, arguments: Mapping[str, Argument], module: str, *, decay: float = 0.0, one_rate: bool = True
) -> Optimizer:
    root = "dadaptation.experimental" if name in ("DAdaptAdamPreprint", "DAdaptAdanIP") else "dadaptation"
    spellings = (f"{root}.{name}", f"{root}.{module}.{name}", name)
    where, full_name = f"{root}:{name}", spellings[1]
    return Optimizer(
        "dadaptation", where, full_name, arguments, decay, one_rate=one_rate, spellings=spellings
    )


def _schedule_free(name: str, arguments: Mapping[str, Argument]) -> Optimizer:
    spellings = (f"schedulefree.{name}", f"schedulefree.{name.lower().replace('sch', '_sch')}.{name}")
    return Optimizer(
        "schedulefree",
        f"schedulefree:{name}",
        spellings[1],
        arguments | _SCHEDULE_FREE,  # type: ignore[operator]
        is_schedule_free=True,
        spellings=spellings,
    )


OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": _torch("AdamW", _TORCH_ADAM, 0.01, ours=_FUSED),
    "AdamW8bit": _bnb("AdamW8bit", _BNB_ADAM, "adamw", 0.01),
    "Lion8bit": _bnb("Lion8bit", _BNB_LION, "lion", 0.0),
    "Adafactor": Optimizer(
        "transformers",
        "transformers.optimization:Adafactor",
        "transformers.optimization.Adafactor",
        {
            "scale_parameter": Argument(FLAG, True),
            "relative_step": Argument(FLAG, True),
            "warmup_init": OFF,
            "eps": Argument(PAIR, (1e-30, 1e-3), low=0, high=1),
            "clip_threshold": CLIP_THRESHOLD,
            "decay_rate": Argument(NUMBER, -0.8, low=-10, high=0),
            "beta1": Argument(NUMBER, None, low=0, high=1, high_is_excluded=True, can_be_none=True),
        },
        ours={"scale_parameter": False, "relative_step": False, "warmup_init": False},
        spellings=("transformers.Adafactor", "transformers.optimization.Adafactor"),
    ),
    "Prodigy": Optimizer(
        "prodigyopt",
        "prodigyopt:Prodigy",
        "prodigyopt.prodigy.Prodigy",
        {
            "betas": BETAS,
            "beta3": Argument(NUMBER, None, low=0, high=1, high_is_excluded=True, can_be_none=True),
            "eps": SOME_EPS,
            "decouple": Argument(FLAG, True),
            "use_bias_correction": OFF,
            "safeguard_warmup": OFF,
            "d0": D0,
            "d_coef": Argument(NUMBER, 1.0, low=0, high=1000, low_is_excluded=True),
            "growth_rate": GROWTH_RATE,
            "slice_p": Argument(WHOLE, 1, low=1, high=100_000),
        },
        ours={"decouple": True},
        one_rate=True,
        spellings=("prodigyopt.Prodigy", "prodigyopt.prodigy.Prodigy"),
    ),
    "Lion": Optimizer(
        "lion-pytorch",
        "lion_pytorch:Lion",
        "lion_pytorch.lion_pytorch.Lion",
        {"betas": LION_BETAS, "decoupled_weight_decay": OFF},
        spellings=("lion_pytorch.Lion", "lion_pytorch.lion_pytorch.Lion"),
    ),
    "PagedAdamW": _bnb("PagedAdamW", _BNB_ADAM, "adamw", 0.01),
    "PagedAdamW8bit": _bnb("PagedAdamW8bit", _BNB_ADAM, "adamw", 0.01),
    "PagedAdamW32bit": _bnb("PagedAdamW32bit", _BNB_ADAM, "adamw", 0.01),
    "PagedLion8bit": _bnb("PagedLion8bit", _BNB_LION, "lion", 0.0),
    "AdEMAMix8bit": _bnb("AdEMAMix8bit", _EMA_MIX, "ademamix", 0.01),
    "PagedAdEMAMix8bit": _bnb("PagedAdEMAMix8bit", _EMA_MIX, "ademamix", 0.01),
    "SGDNesterov": Optimizer(
        "torch",
        "torch.optim:SGD",
        "torch.optim.sgd.SGD",
        {**_SGD, "momentum": NESTEROV_MOMENTUM, "nesterov": Argument(FLAG, True, choices=(True,))},
        ours={"momentum": 0.9, "nesterov": True},
    ),
    "SGDNesterov8bit": Optimizer(
        "bitsandbytes",
        "bitsandbytes.optim:SGD8bit",
        "bitsandbytes.optim.sgd.SGD8bit",
        {
            "momentum": NESTEROV_MOMENTUM,
            "dampening": Argument(NUMBER, 0.0, low=0, high=1),
            "min_8bit_size": MIN_8BIT_SIZE,
        },
        ours={"momentum": 0.9, "nesterov": True},
        spellings=("bitsandbytes.optim.SGD8bit", "bitsandbytes.optim.sgd.SGD8bit"),
    ),
    "DAdaptation": _d_adapt(
        "DAdaptAdamPreprint",
        {"betas": BETAS, "eps": SOME_EPS, "decouple": OFF, **_D_ADAPT},
        "dadapt_adam_preprint",
    ),
    "DAdaptAdaGrad": _d_adapt(
        "DAdaptAdaGrad",
        {
            "momentum": MOMENTUM,
            "eps": Argument(NUMBER, 1e-6, low=0, high=1, low_is_excluded=True),
            **_D_ADAPT,
        },
        "dadapt_adagrad",
        one_rate=False,
    ),
    "DAdaptAdam": _d_adapt(
        "DAdaptAdam",
        {"betas": BETAS, "eps": SOME_EPS, "decouple": OFF, "use_bias_correction": OFF, **_D_ADAPT},
        "dadapt_adam",
    ),
    "DAdaptAdan": _d_adapt("DAdaptAdan", _ADAN, "dadapt_adan", decay=0.02, one_rate=False),
    "DAdaptAdanIP": _d_adapt("DAdaptAdanIP", _ADAN, "dadapt_adan_ip", decay=0.02, one_rate=False),
    "DAdaptLion": _d_adapt(
        "DAdaptLion", {"betas": LION_BETAS, "d0": D0, "log_every": _D_ADAPT["log_every"]}, "dadapt_lion"
    ),
    "DAdaptSGD": _d_adapt("DAdaptSGD", {"momentum": MOMENTUM, **_D_ADAPT}, "dadapt_sgd"),
    "CAME": Optimizer(
        "came-pytorch",
        "came_pytorch:CAME",
        "came_pytorch.CAME.CAME",
        {
            "betas": Argument(TRIPLE, (0.9, 0.999, 0.9999), low=0, high=1),
            "eps": Argument(PAIR, (1e-30, 1e-16), low=0, high=1),
            "clip_threshold": CLIP_THRESHOLD,
        },
        spellings=(
            "came_pytorch.CAME",
            "came_pytorch.CAME.CAME",
            "pytorch_optimizer.CAME",
            "pytorch_optimizer.optimizer.came.CAME",
            "LoraEasyCustomOptimizer.came.CAME",
        ),
    ),
    "RAdamScheduleFree": _schedule_free(
        "RAdamScheduleFree",
        {"betas": _FREE_BETAS, "eps": EPS, "silent_sgd_phase": Argument(FLAG, True)},
    ),
    "AdamWScheduleFree": _schedule_free("AdamWScheduleFree", {"betas": _FREE_BETAS, "eps": EPS, **_WARM_UP}),
    "SGDScheduleFree": _schedule_free("SGDScheduleFree", {"momentum": NESTEROV_MOMENTUM, **_WARM_UP}),
    "Adam": _torch("Adam", {**_TORCH_ADAM, "decoupled_weight_decay": OFF}, ours=_FUSED),
    "RAdam": _torch("RAdam", {**_ADAM, "maximize": NEVER, "decoupled_weight_decay": OFF}),
    "NAdam": _torch(
        "NAdam",
        {
            **_ADAM,
            "maximize": NEVER,
            "momentum_decay": Argument(NUMBER, 0.004, low=0, high=1),
            "decoupled_weight_decay": OFF,
        },
    ),
    "SGD": _torch("SGD", _SGD, ours=_FUSED),
}
OPTIMIZER_NAMES = tuple(OPTIMIZERS)
_BY_SPELLING = {
    spelling.lower(): name
    for name, optimizer in OPTIMIZERS.items()
    for spelling in (name, *optimizer.spellings)
}
_BY_SPELLING |= {"bitsandbytes.optim.adamw": "AdamW", "bitsandbytes.optim.lion": "Lion"}  # in 32 bits


def named(name: Any) -> str | None:
    """The optimizer that a file means: its name or full class name, in any case. None if there is no such one."""
    return _BY_SPELLING.get(name.strip().lower()) if isinstance(name, str) else None


def canonical(name: Any) -> Any:
    """The name of the table, or what was given, for the check that follows."""
    return named(name) or name


def check_installed(optimizer_type: str) -> None:
    """Raise MachineError if the library of an optimizer is not installed. Imports nothing."""
    import importlib.util

    entry = OPTIMIZERS[optimizer_type]
    module = entry.where.partition(":")[0].partition(".")[0]
    try:
        is_there = importlib.util.find_spec(module) is not None
    except ValueError:  # imported, without a spec
        is_there = sys.modules.get(module) is not None
    if not is_there:
        raise missing(optimizer_type)


def missing(optimizer_type: str) -> MachineError:
    package = OPTIMIZERS[optimizer_type].package
    return MachineError(
        f"optimizer_type = {optimizer_type} needs the package {package}, which is not installed",
        f"pip install {package}, or set optimizer_type = AdamW",
    )


def check(optimizer_type: str, optimizer_args: str) -> tuple[dict[str, Any], list[tuple[str, Any, str]]]:
    """The arguments that were set, and those that are wrong, as ``check_arguments``."""
    values = parse("optimizer_args", optimizer_args).values
    return check_arguments("optimizer_args", optimizer_type, values, OPTIMIZERS[optimizer_type].arguments)


def takes(optimizer_type: str, optimizer_args: str) -> bool:
    """Whether an optimizer has these arguments, as when another one is proposed in its place."""
    return not check(optimizer_type, optimizer_args)[1]


def arguments_of(optimizer_type: str, optimizer_args: str) -> dict[str, Any]:
    """What the library is given: this tool's arguments and those that were set. None of the library's defaults."""
    return {**OPTIMIZERS[optimizer_type].ours, **check(optimizer_type, optimizer_args)[0]}


def told_arguments(optimizer_type: str, optimizer_args: str) -> dict[str, Any]:
    """The arguments that another tool must be given for the same updates, weight_decay aside."""
    values = arguments_of(optimizer_type, optimizer_args)
    if optimizer_type in ("SGDNesterov", "SGDNesterov8bit"):
        values.pop("nesterov", None)  # part of the name
    if optimizer_type == "SGD":
        values.setdefault("nesterov", False)
    return {name: value for name, value in values.items() if name not in ONLY_SPEED}


def written(optimizer_type: str, optimizer_args: str, weight_decay: float) -> str:
    """An optimizer as sd-scripts writes it into a LoRA (ss_optimizer)."""
    values = {"weight_decay": weight_decay, **told_arguments(optimizer_type, optimizer_args)}
    return f"{OPTIMIZERS[optimizer_type].full_name}({','.join(as_entries(values))})"


def read_written(text: str) -> tuple[str, list[str]] | None:
    """Class name and arguments of ``written``: ``bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.1,betas=(0.9,
    0.99))``. None for another text. sd-scripts' SGDNesterov is written as torch's SGD with a momentum."""
    match = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", text.strip(), re.DOTALL)
    if match is None:
        return None
    pairs = re.findall(r"\b(\w+)=((?:\([^)]*\)|\[[^]]*\]|[^,()])+)", match[2] or "")
    names = [name for name, _ in pairs]
    kind = match[1]
    if kind == "torch.optim.sgd.SGD" and "momentum" in names and "nesterov" not in names:
        kind = "SGDNesterov"
    return named(kind) or kind.rpartition(".")[2], [f"{name}={value.strip()}" for name, value in pairs]


def effective(optimizer_type: str, optimizer_args: str, name: str) -> Any:
    """The value of an argument, wherever it comes from."""
    default = OPTIMIZERS[optimizer_type].arguments[name].default
    return arguments_of(optimizer_type, optimizer_args).get(name, default)


def has_relative_steps(optimizer_type: str, optimizer_args: str) -> bool:
    """Whether Adafactor chooses its rate itself, so that rates and schedule have no effect."""
    return optimizer_type == "Adafactor" and bool(effective(optimizer_type, optimizer_args, "relative_step"))
