"""transfer(): converts settings found on one base to settings for another with named rules.  Pure.

Owns the rules and their order.  Does not own the plan and its values (see ``hpo.transfer.plan``), family and profile
data (see ``hpo.transfer.profile``), files (see ``hpo.transfer.files``) or the command (see ``hpo.transfer.command``).

E is the effective batch, train_batch_size × gradient_accumulation_steps.  The factor of a rate is called k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hpo.transfer.plan import (
    DatasetFigures,
    SettingMove,
    TransferFinding,
    TransferPlan,
    derive,
    normalised,
    snap_down,
    two_digits,
    updates_of,
)
from hpo.transfer.profile import PRESETS, Profile
from trainer.bases import block_rates
from trainer.checks import suggestion
from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError

MAPPING_VERSION = "1"  # increase it when the result of a rule changes
RATE_FREE = ("Prodigy",)  # adapts its rate itself, so learning_rate is kept (usually 1)
ADAM = ("AdamW", "AdamW8bit")  # the published limits apply to these
MOST_WARMUP = 0.1  # largest share of all steps
SMALL_SHARE = 0.3
RATE_KEYS = ("learning_rate", "text_encoder_lr")
LOW_RATIO, HIGH_RATIO = 0.5, 0.8  # text_encoder_lr / learning_rate in known good settings


@dataclass
class Draft:
    """The settings while the rules are applied.  ``factor`` is k after the rate rule."""

    source: TrainConfig
    figures: DatasetFigures
    profile: Profile
    preset: str | None
    values: dict[str, Any]
    factor: float = 1.0
    text_factor: float = 1.0
    findings: list[TransferFinding] = field(default_factory=list)

    @property
    def cap(self) -> int:
        return (
            PRESETS[self.preset].effective_batch_cap
            if self.preset
            else self.profile.batch.effective_batch_cap
        )

    @property
    def batches(self) -> tuple[int, int]:
        """E of the source and E of the current values."""
        now = self.values["train_batch_size"] * self.values["gradient_accumulation_steps"]
        return self.source.train_batch_size * self.source.gradient_accumulation_steps, now

    @property
    def finds_its_rate(self) -> bool:
        return self.source.optimizer_type in RATE_FREE

    @property
    def rate(self) -> float:
        """The current rate of the U-Net."""
        own = self.values["unet_lr"]
        return self.values["learning_rate"] if own is None else own

    def say(self, level: str, about: str, text: str) -> None:
        self.findings.append(TransferFinding(level, about, text))


@dataclass(frozen=True)
class Change:
    """A value set by a rule.  ``transfer`` makes a ``SettingMove`` of it if it differs from the current value."""

    key: str
    new: Any
    rule: str
    reason: str
    evidence: str = ""


Rule = Callable[[Draft], Iterable[Change]]


def transfer(
    config: TrainConfig, figures: DatasetFigures, profile: Profile, *, preset: str | None = None
) -> TransferPlan:
    """Convert ``config`` for the profile's family, with a ``SettingMove`` for every difference.

    Results outside the range of published settings give a finding of level warn or refuse; the caller decides
    what to do with it.
    """
    if preset is not None and preset not in PRESETS:
        hint = suggestion(preset, PRESETS) or "known presets: " + ", ".join(PRESETS)
        raise ConfigError(f"unknown preset {preset}", hint)
    draft = Draft(config, figures, profile, preset, config.as_dict())
    moves = []
    for rule, _ in RULES:
        for change in rule(draft):
            old = draft.values[change.key]
            if old != change.new:
                moves.append(
                    SettingMove(change.key, old, change.new, change.rule, change.reason, change.evidence)
                )
                draft.values[change.key] = change.new
    result = TrainConfig().with_values(draft.values)
    draft.findings += rate_remarks(result, profile)
    derived = derive(config, result, figures, profile)
    return TransferPlan(config, figures, result, tuple(moves), tuple(draft.findings), derived)


def revised(
    plan: TransferPlan, config: TrainConfig, moves: Sequence[SettingMove], profile: Profile
) -> TransferPlan:
    """The plan after changes by probes or the planner, with updated figures and remarks on the rates."""
    findings = (*(f for f in plan.findings if f.about not in RATE_KEYS), *rate_remarks(config, profile))
    derived = derive(plan.source, config, plan.figures, profile)
    return replace(plan, config=config, moves=(*plan.moves, *moves), findings=findings, derived=derived)


def _limited(key: str, value: float) -> Any:
    """``value`` clipped to the limits of the setting."""
    facts = SETTINGS[key]
    if facts.high is not None:
        value = min(value, facts.high)
    if facts.low is not None:
        value = max(value, facts.low)
    return int(value) if isinstance(value, float) and key.startswith("max_train") else value


# Rules: model, resolution, batch and length


def family_base(draft: Draft) -> Iterator[Change]:
    family = draft.profile.family
    yield Change("pretrained_model_name_or_path", family.base, "family.base", f"the target is {family.title}")


def family_drops(draft: Draft) -> Iterator[Change]:
    """Reset settings that do not apply to the new family, or have a different meaning there."""
    usual = TrainConfig().as_dict()
    for key, reason in draft.profile.family.drops.items():
        yield Change(key, usual[key], "family.drops", reason)
    for key in ("down_lr_weight", "mid_lr_weight", "up_lr_weight"):
        try:
            block_rates(
                TrainConfig().with_values({key: draft.values[key]}), draft.profile.family.architecture
            )
        except ConfigError:
            reason = f"block rates do not fit: {draft.profile.family.title} has different blocks"
            yield Change(key, "", "family.drops", reason)


def family_fixed(draft: Draft) -> Iterator[Change]:
    """Apply the settings of the family, of the profile and of the preset, in this order."""
    family = draft.profile.family
    if family.max_token_length is not None:
        yield Change(
            "max_token_length",
            family.max_token_length,
            "family.fixed",
            "longer captions are not truncated",
        )
    wishes = PRESETS[draft.preset].settings if draft.preset else {}
    for key, value in draft.profile.settings.items():
        if key not in wishes:
            yield Change(key, value, "profile.settings", f"profile {draft.profile.name}")
    for key, value in wishes.items():
        yield Change(key, value, "preset", f"preset {draft.preset}")
    if not family.half_vae and draft.values["mixed_precision"] in ("fp16", "auto"):
        yield Change(
            "no_half_vae", True, "family.fixed", "the VAE overflows in fp16, which gives black images"
        )


def native_resolution(draft: Draft) -> Iterator[Change]:
    family = draft.profile.family
    why = f"the native resolution of {family.title} is {family.native_resolution_px} px"
    for key, value in (
        ("resolution", family.native_resolution_px),
        ("min_bucket_reso", family.min_bucket_reso),
        ("max_bucket_reso", family.max_bucket_reso),
        ("bucket_reso_steps", family.bucket_reso_steps),
        ("bucket_no_upscale", True),
    ):
        yield Change(key, value, "res.native", why)
    if draft.figures.small_share > SMALL_SHARE:
        draft.say(
            "warn",
            "resolution",
            f"{draft.figures.small_share:.0%} of the images are smaller than {family.small_image_px} px, which teaches "
            "the LoRA blur; remove or replace them",
        )


def kept(draft: Draft) -> Iterable[Change]:
    """Keep everything else.  Add the family's notes for values that have a different effect there."""
    usual = TrainConfig().as_dict()
    for key, text in draft.profile.family.notes.items():
        if draft.values[key] != usual[key]:
            draft.say("note", key, f"{key} {draft.values[key]:g} is kept: {text}")
    return ()


def eight_bit(draft: Draft) -> Iterator[Change]:
    if draft.profile.optimizer.eight_bit and draft.values["optimizer_type"] == "AdamW":
        yield Change(
            "optimizer_type",
            "AdamW8bit",
            "opt.8bit",
            "uses a quarter of the optimizer memory at the same rate",
            "8-bit optimizer state gives equal results at the same rates (arXiv 2110.02861)",
        )


def micro_batch(draft: Draft) -> Iterator[Change]:
    before = draft.batches[0]
    new = min(draft.profile.micro_batch(draft.source.train_batch_size), before, draft.cap)
    reason = f"micro-batch for {draft.profile.vram_gb:g} GB (profile {draft.profile.name})"
    yield Change("train_batch_size", new, "batch.micro", reason)


def accumulation(draft: Draft) -> Iterator[Change]:
    """Keep the effective batch up to the cap.  It is never increased."""
    before = draft.batches[0]
    wanted, micro = min(before, draft.cap), draft.values["train_batch_size"]
    steps = max(1, round(wanted / micro))
    if steps * micro > wanted:
        steps = max(1, wanted // micro)
    steps = _limited("gradient_accumulation_steps", steps)
    now = steps * micro
    if now == before:
        what = f"keeps the effective batch of {before}"
    else:
        what = (
            f"effective batch {before} → min({before}, cap {draft.cap}) = {now}: "
            f"{before / now:.3g}× the updates per epoch"
        )
    yield Change("gradient_accumulation_steps", steps, "accum.cap_effective", what)


def length(draft: Draft) -> Iterator[Change]:
    factor = draft.profile.length.epochs_factor
    if draft.source.max_train_steps is not None:
        before, now = draft.batches
        steps = math.ceil(draft.source.max_train_steps * before / now * factor - 1e-9)
        reason = f"{factor:g} × as many images as before: × {before} / {now} for the effective batch"
        yield Change("max_train_steps", _limited("max_train_steps", steps), "steps.scale", reason)
        return
    assert draft.source.max_train_epochs is not None
    # 10 × 1.1 is 11.000000000000002
    epochs = math.ceil(draft.source.max_train_epochs * factor - 1e-9)
    yield Change(
        "max_train_epochs", _limited("max_train_epochs", epochs), "epochs.scale", f"× {factor:g}, rounded up"
    )


# Rules: rates

# Rule name → k from the old E, the new E and the profile; and the evidence for the rule
RATES: dict[str, tuple[Callable[[int, int, Profile], float], str]] = {
    "sqrt_batch": (
        lambda before, now, _: math.sqrt(now / before),
        "√batch rule for Adam (Malladi et al., arXiv 2205.10287); SD1.5 at batch 1/2/4 fits √, not linear",
    ),
    "keep": (lambda before, now, _: 1.0, "1.0 is the most common factor in published SD1.5 / SDXL pairs"),
    "factor": (
        lambda before, now, profile: profile.rate.factor,
        "factors 0.77 and 0.75 of the known transfer in profile sdxl-16gb",
    ),
    "linear_batch": (lambda before, now, _: now / before, "rule for SGD; for Adam √batch fits better"),
}
TEXT_EVIDENCE = (
    "published ratios are 0, 0.1, 0.5 and 1; 0.67 is from one known setup and was not measured elsewhere"
)


def _rounded(draft: Draft, value: float, factor: float) -> tuple[float, str]:
    """The rounded rate, and a text on how it was rounded."""
    if factor == 1.0:
        return value, ""
    exact = value * factor
    if draft.profile.rate.rule == "factor":
        return two_digits(exact), f"{exact:.4g}, rounded to two digits"
    return snap_down(exact), f"{exact:.4g}, rounded down"


def unet_rate(draft: Draft) -> Iterator[Change]:
    """Compute k and apply it to the U-Net rate.  If unet_lr is set, it becomes learning_rate."""
    if draft.finds_its_rate:
        return
    name = draft.profile.rate.rule
    law, evidence = RATES[name]
    before, now = draft.batches
    draft.factor = draft.text_factor = law(before, now, draft.profile)
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
    formula = {"sqrt_batch": f"√({now}/{before})", "linear_batch": f"{now}/{before}"}.get(name, "k")
    new, how = _rounded(draft, rate, draft.factor)
    reason = f"effective batch {before} → {now}: × {formula} = {draft.factor:.3f} → {how}"
    yield Change("learning_rate", new, f"lr.{name}", reason, evidence)
    if scale != 1.0:
        exact = new * scale
        yield Change(
            "learning_rate",
            snap_down(exact),
            "lr.alpha",
            f"alpha {alpha:g} → {new_alpha:g}: × √({alpha:g}/{new_alpha:g}) = {scale:.3f} → {exact:.4g}, rounded down",
            "scaling of the LoRA rate with rank and alpha (arXiv 2602.06204)",
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
        words = f"learning_rate × √(alpha / 16) is {value:.2g}; published settings have 2.8e-5 to 2.8e-4"
        if limits.normalised_refuse is not None and value > limits.normalised_refuse:
            yield TransferFinding(
                "refuse", "learning_rate", f"{words}; values above {limits.normalised_refuse:g} are refused"
            )
        elif limits.normalised_warn is not None and value > limits.normalised_warn:
            most = f"this warning appears above {limits.normalised_warn:g}"
            yield TransferFinding("warn", "learning_rate", f"{words}; {most}")
    if config.optimizer_type in RATE_FREE or not text or not config.trains_text_encoder:
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


def warmup(draft: Draft) -> Iterator[Change]:
    """Keep the warm-up's share of all steps, at most a tenth."""
    steps = draft.source.lr_warmup_steps
    if steps < 1:
        new: float = min(steps, MOST_WARMUP)
        reason = f"the share of the steps is kept, at most {MOST_WARMUP:g}"
    else:
        before = updates_of(draft.source, draft.figures.samples)
        now = updates_of(TrainConfig().with_values(_length_of(draft)), draft.figures.samples)
        new = min(round(steps * now / before), int(MOST_WARMUP * now))
        reason = f"{steps:g} of {before} steps → the same share of {now} steps, at most a tenth"
    yield Change("lr_warmup_steps", float(new), "warmup.ratio", reason)


def _length_of(draft: Draft) -> dict[str, Any]:
    names = ("max_train_epochs", "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
    return {name: draft.values[name] for name in names}


def card(draft: Draft) -> Iterable[Change]:
    """Refuse a GPU below the profile's minimum.  The planner can overrule this."""
    profile = draft.profile
    if profile.vram_gb < profile.refuse_below_gb:
        draft.say(
            "refuse",
            "vram",
            f"{profile.vram_gb:g} GB of GPU memory is below the {profile.refuse_below_gb:g} GB that "
            f"{profile.family.title} needs",
        )
    return ()


# Applied in this order.  The text is for docs/transfer.md.
RULES: tuple[tuple[Rule, str], ...] = (
    (
        card,
        "`vram`: refuse GPU memory below the profile's `refuse_below_gb`, unless the planner finds settings that fit",
    ),
    (family_base, "`family.base`: use the base of the new family"),
    (
        family_drops,
        "`family.drops`: reset settings that do not apply there (clip_skip), and block rates for different blocks",
    ),
    (
        native_resolution,
        "`res.native`: use the family's resolution and buckets without upscaling; warn about small images",
    ),
    (
        family_fixed,
        "`family.fixed`, `profile.settings`, `preset`: set token length, precision, checkpointing, saving",
    ),
    (
        kept,
        "`keep`: keep all other settings; add a note where the same value has a different effect there",
    ),
    (eight_bit, "`opt.8bit`: AdamW → AdamW8bit, rate unchanged"),
    (micro_batch, "`batch.micro`: use the profile's micro-batch, or half of the source's"),
    (
        accumulation,
        "`accum.cap_effective`: E = b × A; E′ = min(E, cap); A′ = max(1, round(E′ / b′)); E is never increased",
    ),
    (length, "`epochs.scale`: ⌈epochs × factor⌉; `steps.scale` if the length is set in steps"),
    (
        unet_rate,
        "`lr.sqrt_batch` × √(E′/E), `lr.keep` × 1, `lr.factor` × f, `lr.linear_batch` × E′/E; `lr.alpha` × √(α/α′) "
        "only if alpha changes",
    ),
    (
        rate_limits,
        "`lr.limits`: clip to the profile's limits; warn if learning_rate × √(alpha/16) > 3e-4, refuse if > 6e-4",
    ),
    (
        text_encoder_rate,
        "`te.inherit_ratio` × the same k; `te.ratio` 0.67 × learning_rate if the search had no such rate; `te.off`",
    ),
    (text_encoder_limits, "`te.cap`: at most 0.8 × learning_rate, never increased; warn above 1e-4"),
    (warmup, "`warmup.ratio`: min(round(w × S′/S), S′/10)"),
)


def rules_table() -> str:
    """The rules as Markdown, for docs/transfer.md."""
    return "\n".join(f"{number}. {text}" for number, (_, text) in enumerate(RULES, 1))
