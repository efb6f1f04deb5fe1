"""transfer(): converts settings found on one base to settings for another with named rules.  Pure.

Owns the rules and their order.  Does not own the plan and its values (see ``hpo.transfer.plan``), family and profile
data (see ``hpo.transfer.profile``), files (see ``hpo.transfer.files``) or the command (see ``hpo.transfer.command``).

E is the effective batch, train_batch_size × gradient_accumulation_steps.  The factor of a rate is called k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from hpo.transfer.draft import RATE_KEYS, Change, Draft, limited
from hpo.transfer.plan import (
    DatasetFigures,
    SettingMove,
    TransferPlan,
    derive,
)
from hpo.transfer.profile import PRESETS, Profile
from hpo.transfer.rates import rate_limits, rate_remarks, text_encoder_limits, text_encoder_rate, unet_rate
from trainer.bases import block_rates
from trainer.checks import suggestion
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.optimizers import takes

MAPPING_VERSION = "4"  # increase it when the result of a rule changes
# The version that last changed a setting that short runs are trained with; target trials of earlier versions are void.
PROBED_VERSION = "1"  # 2 to 4 only changed when files are saved and how steps are counted
MOST_WARMUP = 0.1  # largest share of all steps
SMALL_SHARE = 0.3
LEAST_SAVED, CURVE = 4, 5  # files of a run: fewer than the first number are raised to the second (assumed)


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
    is_adamw = draft.values["optimizer_type"] == "AdamW"
    if draft.profile.optimizer.eight_bit and is_adamw and takes("AdamW8bit", draft.values["optimizer_args"]):
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
    steps = limited("gradient_accumulation_steps", steps)
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
        # Images seen are kept as training makes its batches: the last of a bucket may be smaller.
        target = TrainConfig().with_values(draft.values)
        before, now = (draft.figures.length(c).steps_per_epoch for c in (draft.source, target))
        epochs = draft.source.max_train_steps / before
        steps = math.ceil(draft.source.max_train_steps * now / before * factor - 1e-9)
        reason = (
            f"{epochs * draft.figures.samples:,.0f} images seen{_times(factor)}: an epoch has {before} updates in the "
            f"search and {now} here"
        )
        yield Change("max_train_steps", limited("max_train_steps", steps), "steps.scale", reason)
        return
    assert draft.source.max_train_epochs is not None
    # 10 × 1.1 is 11.000000000000002
    rounded = math.ceil(draft.source.max_train_epochs * factor - 1e-9)
    yield Change(
        "max_train_epochs", limited("max_train_epochs", rounded), "epochs.scale", f"× {factor:g}, rounded up"
    )


def _times(factor: float) -> str:
    return ", as in the search" if factor == 1 else f" × {factor:g}"


def saving(draft: Draft) -> Iterator[Change]:
    """Save often enough for a curve: ``hpo evaluate`` compares the saved files of a run."""
    config = TrainConfig().with_values(draft.values)
    run = draft.figures.length(config)
    if _saved(config, run.total_steps, run.total_epochs) >= LEAST_SAVED:
        return
    every = int(limited("save_every_n_steps", math.ceil(run.total_steps / CURVE)))
    reason = f"{CURVE} files in {run.total_steps} steps, so that hpo evaluate can compare them"
    yield Change("save_every_n_steps", every, "save.curve", reason)
    for key in ("save_every_n_epochs", "save_last_n_epochs", "save_last_n_steps"):
        yield Change(key, None, "save.curve", "replaced by save_every_n_steps")


def _saved(config: TrainConfig, steps: int, epochs: int) -> int:
    """Number of files at the end of the run, with the final one."""
    count = 1
    for length, every, last in (
        (
            steps,
            config.save_every_n_steps,
            (config.save_last_n_steps or steps) // (config.save_every_n_steps or 1),
        ),
        (epochs, config.save_every_n_epochs, config.save_last_n_epochs),
    ):
        if every:
            count += min((length - 1) // every, last or length)
    return count


# Rules: rates


def warmup(draft: Draft) -> Iterator[Change]:
    """Keep the warm-up's share of all steps, at most a tenth."""
    steps = draft.source.lr_warmup_steps
    if steps < 1:
        new: float = min(steps, MOST_WARMUP)
        reason = f"the share of the steps is kept, at most {MOST_WARMUP:g}"
    else:
        before = draft.figures.length(draft.source).total_steps
        now = draft.figures.length(TrainConfig().with_values(draft.values)).total_steps
        new = min(round(steps * now / before), int(MOST_WARMUP * now))
        reason = f"{steps:g} of {before} steps → the same share of {now} steps, at most a tenth"
    yield Change("lr_warmup_steps", float(new), "warmup.ratio", reason)


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
    (
        length,
        "`epochs.scale`: ⌈epochs × factor⌉; `steps.scale` if it is set in steps or images seen: ⌈S × n′/n × factor⌉, "
        "where n is the number of updates in an epoch: the images seen are multiplied by the factor, too",
    ),
    (saving, "`save.curve`: save 5 files during the run if it would save fewer than 4"),
    (
        unet_rate,
        "`lr.sqrt_batch` × √(E′/E), `lr.sqrt_updates` × √(S/S′), `lr.keep` × 1, `lr.factor` × f, "
        "`lr.linear_batch` × E′/E; `lr.alpha` × √(α/α′) only if alpha changes",
    ),
    (
        rate_limits,
        "`lr.limits`: clip to the profile's limits; warn if learning_rate × √(alpha/16), the rate converted to "
        "alpha 16, > 3e-4; refuse if > 6e-4",
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
