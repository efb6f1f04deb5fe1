"""How many settings a number of trials can decide, and which to fix if a study searches more.

Owns the rule of thumb and the order of the settings, both as data, and the ``--set`` values of the fixed ones.  Does
not own the effect of ``--set`` (``hpo.study.overrides``).
"""

from __future__ import annotations

import shlex
from typing import Any

from hpo.study import StudyConfig, another_name, settings_of

TRIALS_EACH = 5  # at most 6 to 8 settings in 30 trials: a judgement, not measured
# From what matters most to what matters least.  A fixed order from published evidence, until a measured one replaces
# it; docs/study.md repeats it.
ORDER: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("learning_rate", "unet_lr"),
        "with a tuned rate, kinds and ranks of LoRA differ by 1–2 % (arXiv 2602.04998)",
    ),
    (
        ("images_seen", "max_train_steps", "max_train_epochs"),
        "the best rate and the length depend on each other (arXiv 2512.22382)",
    ),
    (
        ("text_encoder_lr_ratio", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2"),
        "a second rate; published ratios go from 0 to 1 (docs/transfer.md)",
    ),
    (("network_dim_log2", "network_dim"), "small differences between ranks remain (arXiv 2602.04998)"),
    (
        ("network_alpha_ratio", "network_alpha"),
        "multiplies what the rate does, so the rate can make up for it (arXiv 2602.06204)",
    ),
    (("lr_scheduler",), "decides the rate's mean over the run (assumed)"),
    ((), "not in this list: whoever searches them chose them on purpose"),
    (
        ("train_batch_size", "gradient_accumulation_steps"),
        "the rate makes up for it, by √batch (arXiv 2205.10287)",
    ),
    (("min_snr_gamma",), "speeds up convergence; 5 is the paper's choice (arXiv 2303.09556)"),
    (("noise_offset",), "changes brightness and contrast (assumed)"),
    (("network_dropout", "rank_dropout", "module_dropout"), "off in most published recipes (assumed)"),
    (("warmup_ratio", "lr_warmup_steps"), "a LoRA starts from no change at all (assumed)"),
    (("optimizer_type",), "AdamW and AdamW8bit give equal results at equal rates (arXiv 2110.02861)"),
)


def carried(trials: int) -> int:
    """How many settings so many trials can decide."""
    return max(1, trials // TRIALS_EACH)


def place(name: str) -> int:
    """The place of a parameter in ``ORDER``; 0 matters most."""
    others = next(n for n, (names, _) in enumerate(ORDER) if not names)
    return next((n for n, (names, _) in enumerate(ORDER) if name in names), others)


def to_fix(config: StudyConfig, trials: int) -> tuple[str, ...]:
    """The parameters to fix, what matters least first.  Empty if the trials carry all of them."""
    names = [p.name for p in config.space]
    least = sorted(names, key=lambda name: (-place(name), -names.index(name)))
    return tuple(least[: max(0, len(names) - carried(trials))])


def fixing(config: StudyConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """``--set`` values that fix these parameters at trial 0's settings."""
    active, trained = config.space.settings(config.baseline, config.train), config.config(config.baseline)
    wanted = dict.fromkeys(
        setting
        for name in names
        for n, setting in enumerate(settings_of(name))
        if n == 0 or setting in active
    )
    return tuple(f"{setting}={_value(getattr(trained, setting))}" for setting in wanted)


def budget_lines(config: StudyConfig, trials: int) -> list[str]:
    """What to print before trial 0 if the study searches more settings than its trials can decide."""
    names = to_fix(config, trials)
    if not names:
        return []
    few, searched = carried(trials), len(config.space)
    sets = shlex.join([word for text in fixing(config, names) for word in ("--set", text)])
    which = (
        "the one that usually matters least"
        if len(names) == 1
        else (f"the {len(names)} that usually matter least")
    )
    counted = f"{trials} trial{'s are' if trials != 1 else ' is'}"
    enough = f"enough for about {few}" if trials >= TRIALS_EACH else "too few even for 1"
    return [
        f"this study searches {searched} settings, but {counted} {enough} (rule of thumb: {TRIALS_EACH} trials for "
        f"each setting); to fix {which} (docs/study.md) as in trial 0, start a new study {another_name(sets)}"
    ]


def order_table() -> str:
    """``ORDER`` as Markdown, for docs/study.md."""
    rows = ["| | settings | why |", "|---|---|---|"]
    for number, (names, why) in enumerate(ORDER, 1):
        rows.append(f"| {number} | {', '.join(f'`{name}`' for name in names) or 'all others'} | {why} |")
    return "\n".join(rows)


def _value(value: Any) -> str:
    """As ``--set`` reads it: unset is 0 for the settings of a space."""
    if value is None:
        return "0"
    return f"{value:.12g}" if isinstance(value, float) else str(value)
