"""Judge: what scores the LoRAs of a run – base, prompts, references, scorer – loaded once for all of them.

Owns which images may judge a run, the order of loading (cheap checks first), and that what is drawn is kept and
not drawn again.  Does not choose between scores (``evaluation.checkpoints``, ``evaluation.compare``).

    EVALUATION/base/<hash>/            the untrained base on one prompt set: samples/, anchors.json
    EVALUATION/<checkpoint>/<set>/     one LoRA on one prompt set: samples/, grid.png, metrics.json, lora.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from evaluation import embed
from evaluation.anchors import Anchors, References, embed_references, make_anchors, require_references
from evaluation.answers import self_test
from evaluation.images import SampledImage
from evaluation.prompts import MAX_TOKENS, PromptSet, load_prompts, no_class_word
from evaluation.safeguards import Limits, Safeguards, embed_copies, scene_encoders
from evaluation.sampling import OnImages, SampleConfig, default_config, sample
from evaluation.score import METRICS_NAME, Formula, Score, evaluate_adapter, read_score
from evaluation.style import PatchEncoder, StyleEncoder
from hpo.folder import read_json
from hpo.keeper import DATASET_KEY
from hpo.runfiles import RunFiles
from hpo.study import DEFAULT_STUDY, SHIPPED, Inputs, StudyConfig, build_study, find_study, read_study
from hpo.training import check_device
from hpo.workbench import prompt_sets, reference_paths
from trainer import lorafile
from trainer.bases.base import Base, compute_type
from trainer.bases.load import load_base
from trainer.config import TrainConfig
from trainer.dataset import Dataset
from trainer.errors import ConfigError, DataError, OutOfMemory
from trainer.files import machine_error, sha256_file, write_atomic
from trainer.images import read_picture
from trainer.subsets import read_training_data

if TYPE_CHECKING:
    from hpo.workbench import Say

SWEEP_STEPS = 25  # facts A2: DPM++ 2M with 25 steps for checkpoints and comparisons, 20 in a search
LORA_NAME = "lora.json"  # which LoRA the figures beside it are of
T = TypeVar("T")


@dataclass
class Judge:
    """Everything that every LoRA of a run is scored with."""

    base: Base
    data: Dataset
    prompts: PromptSet
    confirmation: PromptSet | None
    sampling: SampleConfig
    reference_files: tuple[Path, ...]
    references: References
    scorer: embed.Scorer
    likeness: embed.ImageEncoder
    formula: Formula
    safeguards: Safeguards
    say: Say

    def anchors(self, prompts: PromptSet, evaluation: Path, on_image: OnImages | None = None) -> Anchors:
        """The untrained base on a prompt set; measured once, then read."""
        folder = self._base_folder(prompts, evaluation)

        def measure() -> Anchors:
            return make_anchors(
                self.base,
                prompts,
                self.sampling,
                self.references,
                self.scorer,
                self.likeness,
                folder,
                on_image=on_image,
            )

        _make(folder)
        return self._within_memory(measure)

    def untrained_images(self, prompts: PromptSet, evaluation: Path) -> list[SampledImage]:
        """The pictures that the anchors were measured on: the class word instead of the trigger."""
        folder = self._base_folder(prompts, evaluation) / "samples"
        return sample(self.base, prompts, self.sampling, folder, identity=self.base.identity, as_class=True)

    def score(
        self,
        lora: Path,
        prompts: PromptSet,
        anchors: Anchors,
        folder: Path,
        on_image: OnImages | None = None,
    ) -> Score:
        """The score of a LoRA file: from ``folder`` if it is there, else drawn, from where it was left."""
        found = self._stored(lora, anchors, folder)
        if found is not None:
            return found
        _make(folder)
        adapter = lorafile.attach(self.base, lorafile.read(lora))
        try:
            identity = f"{self.base.identity}:{adapter.fingerprint()}"

            def draw() -> Score:
                return evaluate_adapter(
                    self.base,
                    prompts,
                    self.sampling,
                    self.references,
                    self.scorer,
                    self.likeness,
                    anchors,
                    folder,
                    identity=identity,
                    on_image=on_image,
                    formula=self.formula,
                    safeguards=self.safeguards,
                )

            result = self._within_memory(draw)
        finally:
            adapter.remove()
        write_atomic(folder / LORA_NAME, json.dumps({"file": lora.name, "sha256": sha256_file(lora)}))
        return result

    def images(self, lora: Path, prompts: PromptSet, folder: Path) -> list[SampledImage]:
        """The pictures behind a score that ``score`` returned."""
        adapter = lorafile.attach(self.base, lorafile.read(lora))
        try:
            identity = f"{self.base.identity}:{adapter.fingerprint()}"
            return sample(self.base, prompts, self.sampling, folder / "samples", identity=identity)
        finally:
            adapter.remove()

    def check(self, lora: Path) -> None:
        """Raise ModelFileError unless a file can be put into the base."""
        lorafile.attach(self.base, lorafile.read(lora)).remove()

    def free(self) -> None:
        """Give the base's memory back.  The judge is unusable after."""
        self.base.free()

    def _base_folder(self, prompts: PromptSet, evaluation: Path) -> Path:
        parts = (
            self.base.identity,
            prompts.hash,
            self.sampling.hash,
            self.scorer.sha,
            self.likeness.sha,
            self.references.hash,
        )
        return evaluation / "base" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _stored(self, lora: Path, anchors: Anchors, folder: Path) -> Score | None:
        """A finished score of this very file on this scale."""
        note = read_json(folder / LORA_NAME)
        if note is None or note.get("sha256") != sha256_file(lora):
            return None
        try:
            found = read_score(folder / METRICS_NAME)
        except DataError:
            return None
        return found if found.anchors_key == anchors.key and found.formula == self.formula else None

    def _within_memory(self, work: Callable[[], T]) -> T:
        """``work``, with half as many images at once as long as the memory does not suffice."""
        while True:
            try:
                return work()
            except OutOfMemory:
                size = self.sampling.batch_size // 2
                if size < 1:
                    raise
                self.sampling = replace(self.sampling, batch_size=size)
                self.say(f"out of memory: drawing {size} images at once from here on")
                if self.base.device.type == "cuda":
                    torch.cuda.empty_cache()


def load(run: RunFiles, inputs: Inputs, say: Say, *, like: Judge | None = None) -> Judge:
    """Read and check everything that judges a run; nothing is written.

    ``like``: take prompts, references and encoders from another run's judge, so that two bases are compared on
    the same.
    """
    device = inputs.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    config = _config(run, inputs)
    spec = config.pretrained_model_name_or_path
    study = _definition(run, spec)
    data = _training_data(run, config, inputs)
    paths = list(like.reference_files) if like else _references(run, inputs, data)
    _check_unseen(run, paths, data)
    require_references(len(paths))
    scorer_spec = inputs.clip or _studys_scorer(run) or study.study.clip or embed.default_scorer(spec)
    likeness_spec = study.study.likeness or embed.default_likeness(spec)
    if like is None:
        embed.check_scorer(scorer_spec)
        embed.check_likeness(likeness_spec)
        _sets(run, inputs, study, data, lambda text: 0)
    say(f"loading {spec} on {device} …")
    base = load_base(
        spec,
        device=device,
        dtype=compute_type(config.mixed_precision, device),
        no_half_vae=config.no_half_vae,
    )
    _say_changes(run, base, data, say)
    scorer: embed.Scorer
    likeness: embed.ImageEncoder
    if like is None:
        prompts, confirmation = _sets(run, inputs, study, data, base.token_count)
        scorer = embed.load_scorer(scorer_spec, device)
        self_test(scorer)
        plain = embed.load_likeness(likeness_spec, scorer, device)
        likeness = StyleEncoder(cast(PatchEncoder, plain)) if study.preset.style else plain
        formula = Formula(**dataclasses.asdict(study.score))
        references = embed_references(paths, likeness)
        for note in prompts.notes:
            say(note)
    else:
        prompts, confirmation, references = like.prompts, like.confirmation, like.references
        scorer, likeness, formula = like.scorer, like.likeness, like.formula
        _check_readable(base, confirmation or prompts)
    encoders = scene_encoders(scorer, likeness)
    copies = embed_copies([item.path for item in data.items], paths, encoders)
    return Judge(
        base,
        data,
        prompts,
        confirmation,
        _sampling(run, study, config, base),
        tuple(paths),
        references,
        scorer,
        likeness,
        formula,
        Safeguards(encoders, copies, Limits(**dataclasses.asdict(study.limits))),
        say,
    )


def _config(run: RunFiles, inputs: Inputs) -> TrainConfig:
    """How it was trained.  A file of another program does not say on which base and images."""
    foreign = not run.own and lorafile.CONFIG_KEY not in run.metadata()
    if foreign and not inputs.base:
        raise ConfigError(
            f"{run.settings} does not say which base model it is for",
            "give it with --base, for example --base sdxl",
        )
    data = inputs.data
    if data is None and run.study is not None:
        data = Path(_facts(run)["data"])
    config = run.config(inputs.base, data)
    if not config.train_data_dir and not config.dataset_config:
        raise DataError(
            f"it is not known on which images {run.name} was trained",
            "give their folder with --data: prompts are made of its captions, and none of it may judge the LoRA",
        )
    return config


def _facts(run: RunFiles) -> dict[str, Any]:
    """study.json of a trial's study."""
    assert run.study is not None
    facts = read_json(run.study.facts)
    forms = {"data": str, "references": list, "sampling": dict}
    if facts is None or not all(isinstance(facts.get(name), form) for name, form in forms.items()):
        raise ConfigError(f"{run.study.facts} cannot be read", "restore it, or give the LoRA's file itself")
    return facts


def _definition(run: RunFiles, spec: str) -> StudyConfig:
    """Which prompts, encoders, formula and limits: the trial's study's, else those that go with the base."""
    sections = _facts(run).get("sections") if run.study is not None else None
    if sections:
        return build_study("study", sections)
    return read_study(find_study(None, spec))


def _studys_scorer(run: RunFiles) -> str | None:
    """--clip as the trial's study was given it."""
    given = _facts(run).get("inputs") if run.study is not None else None
    return given.get("clip") if isinstance(given, dict) else None


def _training_data(run: RunFiles, config: TrainConfig, inputs: Inputs) -> Dataset:
    """What the run was trained on, references left out for a study's trial."""
    trigger, class_word = inputs.trigger, inputs.class_word
    if run.study is not None and inputs.data is None:
        chosen = load_prompts(run.study.prompts, trigger=None, class_word=None, count_tokens=lambda text: 0)
        trigger, class_word = trigger or chosen.trigger, class_word or chosen.class_word
    data = read_training_data(config, trigger=trigger, class_word=class_word)
    if run.study is None:
        return data
    apart = {_sha(path) for path in _study_references(run)}
    return replace(data, items=tuple(item for item in data.items if item.sha256 not in apart))


def _study_references(run: RunFiles) -> list[Path]:
    return [Path(str(path)) for path in _facts(run)["references"]]


def _references(run: RunFiles, inputs: Inputs, data: Dataset) -> list[Path]:
    """The images that judge likeness: none of them was trained on."""
    if inputs.references:
        return reference_paths(inputs.references, data)
    if run.study is not None:
        return _study_references(run)
    if not data.held_out:
        raise DataError(
            f"{run.name} was trained on all {len(data.items)} images, so its likeness cannot be claimed",
            "give images that it has not seen with --references DIR (before training: put some into held_out/)",
        )
    return [item.path for item in data.held_out]


def _check_unseen(run: RunFiles, paths: list[Path], data: Dataset) -> None:
    trained = {item.sha256 for item in data.items}
    for path in paths:
        if _sha(path) in trained:
            raise DataError(
                f"{path} is trained on too, by {run.name}",
                "references must be images that training does not see",
            )


def _sha(path: Path) -> str:
    return read_picture(path).sha256


def _say_changes(run: RunFiles, base: Base, data: Dataset, say: Say) -> None:
    """What is other than in the training."""
    metadata = run.metadata()
    if metadata.get("lora_hpo_base", base.identity) != base.identity:
        say(f"warning: {run.name} was trained on another base than {base.name}")
    if metadata.get(DATASET_KEY, data.content_hash) != data.content_hash:
        say(
            f"warning: {data.root} has other images or captions than {run.name} was trained on: "
            "whether it has seen the references is not known"
        )


def _check_readable(base: Base, prompts: PromptSet) -> None:
    for prompt in prompts.prompts:
        tokens = base.token_count(prompt.text)
        if tokens > MAX_TOKENS:
            raise ConfigError(
                f"{base.name} would cut the prompt {prompt.text[:40]!r}… ({tokens} of {MAX_TOKENS} tokens)",
                "give shorter ones with --prompts",
            )


def _sets(
    run: RunFiles, inputs: Inputs, study: StudyConfig, data: Dataset, count_tokens: Callable[[str], int]
) -> tuple[PromptSet, PromptSet | None]:
    """The search and the confirmation prompts: the study's own for its trials."""
    if run.study is not None and inputs.prompts is None:
        read = [
            load_prompts(path, trigger=None, class_word=None, count_tokens=count_tokens)
            for path in (run.study.prompts, run.study.confirmation)
            if path.is_file()
        ]
        return read[0], read[1] if len(read) > 1 else None
    if not data.class_word and inputs.prompts is None:
        raise no_class_word()
    return prompt_sets(inputs, study, data, count_tokens)


def _sampling(run: RunFiles, study: StudyConfig, config: TrainConfig, base: Base) -> SampleConfig:
    """The study's way for its trials; else the base's usual one at the size it was trained at."""
    if run.study is not None:
        known = {f.name for f in dataclasses.fields(SampleConfig)}
        stored = _facts(run)["sampling"]
        return SampleConfig(**{name: value for name, value in stored.items() if name in known})
    said = run.own or not {lorafile.CONFIG_KEY, "ss_resolution"}.isdisjoint(run.metadata())
    side_px = config.resolution // 8 * 8 if said else base.native_resolution_px
    values = study.sample_values() | {"width_px": side_px, "height_px": side_px}
    if find_study(None, config.pretrained_model_name_or_path) == SHIPPED / f"{DEFAULT_STUDY}.toml":
        values["steps"] = SWEEP_STEPS
    return default_config(base, **(values | {"clip_skip": config.clip_skip}))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, folder) from error
