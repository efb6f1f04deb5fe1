"""Rules for the learning rates of U-Net and text encoders, and the ranges of published recipes.

k is the factor of a rate, E the effective batch size.  Their place in the order is in ``hpo.transfer.rules``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hpo.transfer.draft import Change, Draft, finds_its_rate
from hpo.transfer.plan import (
    TransferFinding,
    TransferPlan,
    normalised,
    snap_down,
    two_digits,
)
from hpo.transfer.profile import Profile
from trainer.config import TrainConfig

LOW_RATIO, HIGH_RATIO = 0.5, 0.8  # text_encoder_lr / learning_rate in known good settings
ADAM = ("AdamW", "AdamW8bit")  # the published limits apply to these


TABLE = "on the miniatures the best rate goes with 1 / √(alpha × updates), not with keep or linear (docs/search.md)"
Pair = tuple[int, int]  # in the search, and here
# Rule name → k from the effective batches, the numbers of updates and the profile; and the evidence for the rule
RATES: dict[str, tuple[Callable[[Pair, Pair, Profile], float], str]] = {
    "sqrt_batch": (
        lambda batches, updates, _: math.sqrt(batches[1] / batches[0]),
        f"√batch rule for Adam (Malladi et al., arXiv 2205.10287); {TABLE}, which is √batch for as many images",
    ),
    "sqrt_updates": (
        lambda batches, updates, _: math.sqrt(updates[0] / updates[1]),
        f"√batch rule for Adam (Malladi et al., arXiv 2205.10287), and a longer training needs a lower rate: {TABLE}",
    ),
    "keep": (
        lambda batches, updates, _: 1.0,
        "1.0 is the most common factor in published SD1.5 / SDXL pairs",
    ),
    "factor": (
        lambda batches, updates, profile: profile.rate.factor,
        "factors 0.77 and 0.75 of the known transfer in profile sdxl-16gb",
    ),
    "linear_batch": (
        lambda batches, updates, _: batches[1] / batches[0],
        "rule for SGD; for Adam √batch fits better",
    ),
}


def rate_factors(plan: TransferPlan, profile: Profile) -> tuple[float, float]:
    """The exact factors of the U-Net rate and of the text encoder rate, before rounding and limits."""
    if finds_its_rate(plan.source):
        return 1.0, 1.0
    factor = RATES[profile.rate.rule][0](plan.derived.effective_batch, plan.derived.updates, profile)
    text = profile.rate.text_encoder_factor if profile.rate.rule == "factor" else factor
    alpha = math.sqrt(plan.source.network_alpha / plan.config.network_alpha)
    return factor * alpha, text


TEXT_EVIDENCE = (
    "published ratios are 0, 0.1, 0.5 and 1; 0.67 is from one known setup and was not measured elsewhere"
)


def _rounded(draft: Draft, value: float, factor: float) -> tuple[float, str]:
    """The rounded rate, and a text on how it was rounded."""
    if factor == 1.0:
        return value, ""
    exact = value * factor
    if draft.profile.rate.rule in ("factor", "sqrt_updates"):
        return two_digits(exact), f"{exact:.4g}, rounded to two digits"
    return snap_down(exact), f"{exact:.4g}, rounded down"


def unet_rate(draft: Draft) -> Iterator[Change]:
    """Compute k and apply it to the U-Net rate.  If unet_lr is set, it becomes learning_rate."""
    if draft.finds_its_rate:
        return
    name = draft.profile.rate.rule
    law, evidence = RATES[name]
    before, now = draft.batches
    updates = draft.updates
    draft.factor = draft.text_factor = law((before, now), updates, draft.profile)
    if name == "factor":
        draft.text_factor = draft.profile.rate.text_encoder_factor
    alpha, new_alpha = draft.source.network_alpha, draft.values["network_alpha"]
    scale = math.sqrt(alpha / new_alpha)
    rate = draft.source.effective_unet_lr
    if rate == 0:
        return
    if draft.source.unet_lr is not None:
        yield Change(
            "learning_rate", rate, "lr.fold", "unet_lr is the rate of the U-Net; it is moved to learning_rate"
        )
        yield Change("unet_lr", None, "lr.fold", "moved to learning_rate")
    formula = {
        "sqrt_batch": f"√({now}/{before})",
        "sqrt_updates": f"√({updates[0]}/{updates[1]})",
        "linear_batch": f"{now}/{before}",
    }.get(name, "k")
    new, how = _rounded(draft, rate, draft.factor)
    what = (
        "updates {} → {}".format(*updates) if name == "sqrt_updates" else f"effective batch {before} → {now}"
    )
    reason = f"{what}: × {formula} = {draft.factor:.3f} → {how}"
    yield Change("learning_rate", new, f"lr.{name}", reason, evidence)
    if scale != 1.0:
        exact = new * scale
        yield Change(
            "learning_rate",
            snap_down(exact),
            "lr.alpha",
            f"alpha {alpha:g} → {new_alpha:g}: × √({alpha:g}/{new_alpha:g}) = {scale:.3f} → {exact:.4g}, rounded down",
            f"scaling of the LoRA rate with rank and alpha (arXiv 2602.06204); {TABLE}",
        )


def rate_limits(draft: Draft) -> Iterator[Change]:
    """Clip the rate to the profile's limits.  ``rate_remarks`` warns about or refuses extreme
    rates for their alpha."""
    limits, rate = draft.profile.limits, draft.rate
    if draft.values["optimizer_type"] not in ADAM or rate == 0:
        return
    low, high = limits.learning_rate_low, limits.learning_rate_high
    new = min(max(rate, low), high)
    yield Change(
        "learning_rate",
        new,
        "lr.limits",
        f"this profile limits rates to {low:g} to {high:g}",
        "published AdamW settings",
    )


def text_encoder_rate(draft: Draft) -> Iterator[Change]:
    """Set the text encoder rate: off, the searched ratio, or a share of the U-Net rate if it was not searched."""
    source, rate = draft.source, draft.rate
    for key in ("text_encoder_lr1", "text_encoder_lr2"):
        yield Change(key, None, "te.inherit_ratio", "one rate for all text encoders, as in the search")
    if draft.profile.rate.text_encoder == "off" and rate > 0:
        yield from _text_encoders_off("the profile does not train the text encoders")
        return
    if source.network_train_unet_only:
        return
    given = source.text_encoder_lr if source.text_encoder_lr1 is None else source.text_encoder_lr1
    if given is None and (source.unet_lr is not None):
        given = source.learning_rate  # kohya uses learning_rate for the text encoders in this case
    if given == 0:
        yield from _text_encoders_off("the search did not train the text encoders")
    elif draft.finds_its_rate:
        yield Change("text_encoder_lr", given, "te.inherit_ratio", "the optimizer adapts the rate")
    elif given is not None:
        new, how = _rounded(draft, given, draft.text_factor)
        ratio = f", {new / rate:.2f} of learning_rate" if rate > 0 else ""
        reason = f"× {draft.text_factor:.3f}, like learning_rate → {how or 'kept'}{ratio}"
        yield Change("text_encoder_lr", new, "te.inherit_ratio", reason, TEXT_EVIDENCE)
    else:
        share = draft.profile.rate.text_encoder_ratio
        reason = f"no text encoder rate in the search: {share:g} × learning_rate = {share * rate:.4g}, rounded down"
        yield Change("text_encoder_lr", snap_down(share * rate), "te.ratio", reason, TEXT_EVIDENCE)


def _text_encoders_off(reason: str) -> Iterator[Change]:
    yield Change("text_encoder_lr", 0.0, "te.off", reason)
    yield Change("network_train_unet_only", True, "te.off", "allows caching the text encoder outputs")


def text_encoder_limits(draft: Draft) -> Iterator[Change]:
    rate, text = draft.rate, draft.values["text_encoder_lr"]
    if draft.finds_its_rate or not text or draft.values["network_train_unet_only"]:
        return
    limits, cap = draft.profile.limits, draft.profile.rate.text_encoder_cap
    if rate > 0 and text > cap * rate * (1 + 1e-9):
        yield Change("text_encoder_lr", snap_down(cap * rate), "te.cap", f"at most {cap:g} × learning_rate")
    elif rate == 0 and draft.values["optimizer_type"] in ADAM and text > limits.learning_rate_high:
        highest = limits.learning_rate_high
        yield Change("text_encoder_lr", highest, "te.cap", "the highest rate allowed by this profile")


def rate_remarks(config: TrainConfig, profile: Profile) -> Iterator[TransferFinding]:
    """Findings that compare the resulting rates with published settings.  None for optimizers
    that adapt their rate."""
    limits, rate, text = profile.limits, config.effective_unet_lr, config.effective_text_encoder_lr
    if config.optimizer_type in ADAM and rate > 0:
        value = normalised(rate, config.network_alpha)
        words = (
            f"learning_rate, converted to alpha 16 (× √(alpha / 16)), is {value:.2g}; published settings "
            "have 2.8e-5 to 2.8e-4"
        )
        if limits.normalised_refuse is not None and value > limits.normalised_refuse:
            yield TransferFinding(
                "refuse", "learning_rate", f"{words}; values above {limits.normalised_refuse:g} are refused"
            )
        elif limits.normalised_warn is not None and value > limits.normalised_warn:
            most = f"this warning appears above {limits.normalised_warn:g}"
            yield TransferFinding("warn", "learning_rate", f"{words}; {most}")
    if finds_its_rate(config) or not text or not config.trains_text_encoder:
        return
    if rate > 0 and text < LOW_RATIO * rate:
        yield TransferFinding(
            "note",
            "text_encoder_lr",
            f"text_encoder_lr is {text / rate:.2f} × learning_rate (known setups: {LOW_RATIO} to {HIGH_RATIO}, "
            f"sd-scripts' documentation: 0.1); it is not increased",
        )
    if limits.text_encoder_lr_warn is not None and text > limits.text_encoder_lr_warn:
        yield TransferFinding(
            "warn",
            "text_encoder_lr",
            f"text_encoder_lr {text:g} is above {limits.text_encoder_lr_warn:g}; text encoders overfit quickly",
        )
