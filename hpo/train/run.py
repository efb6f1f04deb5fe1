"""One run of ``hpo train``: from checked settings to LoRA files in the output folder.

Owns the order of a run and its error handling. The same command resumes a run that was stopped, killed or
unplugged, from the newest complete checkpoint. With several processes (``trainer.loop.ranks``) the first one
writes files and prints, the others only train.

    OUTPUT/name.safetensors               the result
    OUTPUT/name-000002.safetensors        save_every_n_epochs
    OUTPUT/name-step00000100.safetensors  save_every_n_steps
    OUTPUT/sample/                        sample_every_n_…
    OUTPUT/name.run/                      config.json, train.jsonl, ladder.jsonl, memory.json, threads.json,
                                          checkpoints/, cache/, metadata.json (with no_metadata)
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpo.health import Guard, Lookout, Needs, halve
from hpo.machine import deterministic, gpu_uuid, own_device, share_threads
from hpo.night import need_a_fresh_process
from hpo.study import RUNS, alone, clean_advice, origin_of, read_json, recorded_at
from hpo.terminal import Stop, command, on_device
from hpo.train import memory as runmemory
from hpo.train.adapter import StepLog, train_adapter
from hpo.train.folder import RunFolder, run_folder
from hpo.train.keeper import Keeper
from hpo.train.ladder import RunLadder
from hpo.train.needs import FileSizes, file_sizes, needs
from hpo.train.placement import Place, load
from hpo.train.plan import Steps, count_steps
from hpo.train.promptfile import SamplePrompt, sample_prompts
from hpo.train.view import TrainView
from trainer.config import SETTINGS, TrainConfig
from trainer.data import DRAWN_ANEW, Dataset, differences, read_captions, read_training_data
from trainer.errors import ConfigError, Interrupted, MachineError, OutOfMemory
from trainer.events import Event, Rehearsed, Step, Validated
from trainer.files import make_folder, sweep_tree, write_atomic
from trainer.loop import Conduct, Ranks, join, launched, leave, steps_behind
from trainer.oom import out_of_memory_named, release

if TYPE_CHECKING:
    from trainer.adapters import Adapter
    from trainer.bases import Base
    from trainer.data import Prepared


def run(
    config: TrainConfig, output: Path, device: str | None, console: Console, lookout: Lookout | None = None
) -> Path:
    """Train to the end and return the LoRA's path.  Raises ToolError; Interrupted if the user stopped it.

    ``lookout``: how the health of the run is watched.
    """
    ranks = launched()
    if not ranks.is_first:
        console = Console(quiet=True)
    folder = run_folder(output, config)
    data = read_training_data(config)
    given, view = device, TrainView(console, folder.name)
    ladder = RunLadder(folder.ladder, config, view.say, writes=ranks.is_first)
    if is_done(folder, ladder.config, data):
        view.say(f"{folder.lora} is trained already, with these settings and images")
        return folder.lora
    for note in data.notes:
        view.say(f"note: {note}")
    samples = sample_prompts(config)
    for line in samples.findings:
        view.say(f"warning: {line}")
    for line in differences(ladder.config, data):
        view.say(f"differs from sd-scripts: {line}")
    view.say(f"steps: {count_steps(config, data).line(config)}")
    deterministic()
    device = own_device(
        device,
        base=config.pretrained_model_name_or_path,
        precision="bf16" if config.full_bf16 else config.mixed_precision,
        say=view.say,
        local_rank=ranks.local,
        ranks=ranks.world,
    )
    _check_parts(config, ranks, view.say)
    make_folder(folder.root)
    # no second run may train into the same files; the other processes of a run share the first one's lock
    with alone(folder.root / "lock", f"trains {folder.name}") if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            sweep_tree(folder.root)
            if behind := steps_behind(folder.checkpoints):
                view.say(f"resuming from step {behind}")
            write_atomic(folder.config, json.dumps(config.as_dict(), indent=1))
        _share_threads(folder, device, ranks, view.say)
        join(ranks, device)
        try:
            vram = ranks.lowest(runmemory.free_bytes(device))
            runmemory.apply_plan(ladder, vram, steps_behind(folder.checkpoints), view.say)
            place = Place(load(ladder.config, data, device, view.say))
            with (
                recorded_at(folder.root, folder.root, f"train {folder.name}")
                if ranks.is_first
                else contextlib.nullcontext() as work
            ):
                training = _Run(folder, data, list(samples.prompts), place, ladder, view, ranks)
                training.do(training.guard(lookout or Lookout(), device))
                if work is not None:
                    work.says = f"LoRA: {folder.lora}"
        finally:
            leave()
    view.say(f"LoRA: {folder.lora}")
    view.say(f"log: {folder.steps}")
    view.say(_following(config, data, output, given))
    return folder.lora


def _share_threads(folder: RunFolder, device: str, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Take this process's part of the CPU.  On a CPU a run goes on with the number of threads that it began with."""
    if ranks.world > 1:  # its launcher decides
        return
    noted = read_json(folder.threads) or {}
    began = noted.get("threads") if steps_behind(folder.checkpoints) and device == "cpu" else None
    begun_with = began if isinstance(began, int) and began > 0 else None
    threads = share_threads(begun_with)
    if begun_with not in (None, threads):
        say(f"note: begun with {begun_with} CPU threads, goes on with {threads}: the last bits may differ")
    write_atomic(folder.threads, json.dumps({"threads": threads}))


def _following(config: TrainConfig, data: Dataset, output: Path, device: str | None) -> str:
    """The command that scores the checkpoints, or what it needs that the run does not say."""
    transferred = origin_of(config.training_comment or "") is not None
    needed = (
        [] if transferred or data.class_word else ["--class WORD (what the subject is: girl, style, vase)"]
    )
    needed += [] if transferred or data.held_out else ["--references DIR (images that were not trained on)"]
    scored = command("hpo", "evaluate", output, *on_device(device))
    return f"to score the checkpoints: {scored} with {' and '.join(needed)}" if needed else f"next: {scored}"


def _check_parts(config: TrainConfig, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Several processes share the images of a step: there must be one for each."""
    if ranks.world == 1:
        return
    if config.effective_batch_size < ranks.world:
        raise ConfigError(
            f"{ranks.world} processes share {config.effective_batch_size} images a step: some have nothing to do",
            "raise gradient_accumulation_steps or train_batch_size, or start fewer processes",
        )
    say(
        f"{ranks.world} processes share each step: the effective batch stays {config.effective_batch_size} "
        "(sd-scripts would multiply it)"
    )


@dataclass
class _Run:
    """Everything that belongs to one run while it trains."""

    folder: RunFolder
    data: Dataset
    prompts: list[SamplePrompt]
    place: Place
    ladder: RunLadder
    view: TrainView
    ranks: Ranks
    files: tuple[TrainConfig, Steps, FileSizes] | None = None  # what decides them, once the base is loaded

    def guard(self, lookout: Lookout, device: str) -> Guard:
        """What watches the health of this run, and of the GPU that it is on."""
        guard = Guard(
            lookout,
            self.folder.root,
            self.view.say,
            name=f"train {self.folder.name}",
            device=device,
            uuid=gpu_uuid(device),
            needs=lambda: self._needs(guard.health.progress),
            left=lambda: self.view.seconds_left() if self.view.last else None,
            pauses=self.ranks.world == 1,
        )
        self.view.health = guard.line
        return guard

    def _needs(self, progress: Mapping[str, Any]) -> Needs | None:
        """Called from the thread of the guard."""
        return None if self.files is None else needs(*self.files, int(progress.get("done", 0)))

    def do(self, guard: Guard) -> None:
        """Train, taking the next rung of the ladder when memory runs out, and write the result."""
        with (
            Stop(self.view.on_ask) as stop,
            self.view,
            guard if self.ranks.is_first else contextlib.nullcontext(),
        ):
            while True:
                try:
                    with out_of_memory_named(self.ladder.config):
                        keeper, adapter = self._attempt(stop, guard)
                    break
                except OutOfMemory as error:
                    need_a_fresh_process(error)
                    why = error.message
                except Interrupted:
                    if guard.should_stop and not stop():
                        raise guard.full_error(clean_advice(RUNS)) from None
                    raise
                guard.health.out_of_memory(why)
                release(self.place.device)
                if self.ladder.step_down(why, steps_behind(self.folder.checkpoints)) is None:
                    raise OutOfMemory(
                        f"{why}, and there is nothing left to give up (tried: {', '.join(self.ladder.tried)})",
                        "use a smaller resolution or network_dim, or close what else uses the card",
                    )
        try:
            if self.ranks.is_first:
                adapter.round_to(self.ladder.config.save_precision)
                keeper.write(self.folder.lora, adapter, keeper.steps.total_steps, keeper.steps.epochs)
        finally:
            adapter.remove()
        if self.ranks.is_first:
            shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        self.ranks.wait()

    def _attempt(self, stop: Stop, guard: Guard) -> tuple[Keeper, Adapter]:
        config, folder, first = self.ladder.config, self.folder, self.ranks.is_first
        self.place.prepare(config)
        sizes = file_sizes(self.place.base, config, len(self.prompts))
        keeper = Keeper(
            folder,
            config,
            self.place,
            self.data,
            self.prompts,
            self.view.say,
            lambda path: guard.health.saved(path, sizes.weights_bytes),
        )
        self.files = config, keeper.steps, sizes
        guard.begins(stage="train")
        log = StepLog(folder.steps)
        with _board(config, folder, self.ranks) as board:

            def on_event(event: Event, adapter: Adapter) -> None:
                if not first:
                    return
                log.write(event)
                self.view.on_event(event)
                board(event)
                if isinstance(event, Rehearsed):
                    runmemory.remember(folder.memory, config, event, self.place.base, self.view.say)
                keeper.on_event(event, adapter)
                guard.on_event(event, stop)

            def prepare(adapter: Adapter) -> tuple[Prepared, Conduct]:
                prepared = self._prepared(stop)
                guard.relief = partial(halve, prepared.store)
                if first:
                    keeper.on_start(adapter, steps_behind(folder.checkpoints))
                split = _held_out(self.place.base, config, self.data, folder) if first else None
                self.place.settle(config, prepared)
                how = Conduct(
                    checkpoints=folder.checkpoints,
                    should_stop=lambda: stop() or guard.should_stop,
                    validate_on=split,
                    rehearse=True,
                    changed=self.ladder.changed,
                    ranks=self.ranks,
                )
                return prepared, how

            adapter = train_adapter(self.place.base, config, prepare, on_event, self.view.say)
        return keeper, adapter

    def _prepared(self, stop: Stop) -> Prepared:
        """Images and captions, encoded by the first process and read by the others."""
        from trainer.data import cache

        def on_image(done: int, total: int) -> None:
            if stop() and done < total:
                raise Interrupted(f"stopped after encoding {done}/{total} images", "the same command goes on")

        if not self.ranks.is_first:
            self.ranks.wait()
        while True:
            try:
                prepared = cache.prepare(
                    self.place.base, self.data, self.ladder.config, self.folder.cache, on_image=on_image
                )
                break
            except OutOfMemory as error:
                why, hint = error.message, error.hint
            release(self.place.device)
            if self.ladder.step_down(why, steps_behind(self.folder.checkpoints), encoding=True) is None:
                raise OutOfMemory(why, hint)
        if self.ranks.is_first:
            self.ranks.wait()
        self.view.say(f"{len(prepared.latents)} latents, {prepared.encoded_images} of them encoded now")
        if prepared.encodes_anew:
            self.view.say("random_crop or color_aug: images are encoded anew each time they are trained")
        return prepared


def _held_out(base: Base, config: TrainConfig, data: Dataset, folder: RunFolder) -> Prepared | None:
    """The images of held_out/ for the validation loss, with their captions or the subject's words."""
    from trainer.data import cache

    if not data.held_out:
        return None
    words = " ".join(word for word in (data.trigger, data.class_word) if word) or "a picture"
    paths = [item.path for item in data.held_out if not item.caption]
    captions, _ = read_captions(paths, config.caption_extension, data.root, instead=words)
    items = tuple(
        replace(
            item,
            caption=item.caption or captions[item.path],
            own=tuple(pair for pair in item.own if pair[0] not in DRAWN_ANEW),
        )
        for item in data.held_out
    )
    plain = config.with_values({"flip_aug": False, "alpha_mask": False} | dict.fromkeys(DRAWN_ANEW, False))
    return cache.prepare(base, replace(data, items=items, held_out=()), plain, folder.cache)


def is_done(folder: RunFolder, config: TrainConfig, data: Dataset) -> bool:
    """Whether the result exists, with these settings and images. A file from another run is never replaced."""
    if not folder.lora.exists():
        return False
    from trainer.adapters import CONFIG_KEY, DATASET_KEY, private, shared_settings
    from trainer.bases import short_name
    from trainer.loop import FREE_SETTINGS

    metadata = private.metadata_of(folder.lora, folder.metadata)
    saved = json.loads(metadata.get(CONFIG_KEY, "{}"))
    deciding = SETTINGS.keys() - (FREE_SETTINGS - {"pretrained_model_name_or_path", "save_precision"})
    now = shared_settings(config, short_name(config.pretrained_model_name_or_path))
    changed = [
        name
        for name in SETTINGS
        if name in deciding and saved.get(name, getattr(TrainConfig(), name)) != now[name]
    ]
    if metadata.get(DATASET_KEY) != data.content_hash:
        changed.append("images or captions")
    if changed:
        what = f"was trained with another {', '.join(changed[:5])}" if saved else "was not made by this tool"
        raise ConfigError(
            f"{folder.lora} {what}", "choose another --output or --set output_name=…, or move the file away"
        )
    return True


@contextlib.contextmanager
def _board(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> Any:
    """What writes events to TensorBoard, if logging_dir is set."""
    if not config.logging_dir or not ranks.is_first:
        yield lambda event: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "logging_dir needs TensorBoard, which is not installed",
            "pip install tensorboard, or leave logging_dir out: train.jsonl is always written",
        ) from None
    # what an earlier call wrote after the checkpoint that this one resumes from is removed
    again = steps_behind(folder.checkpoints) + 1
    writer = SummaryWriter(str(Path(config.logging_dir) / folder.name), purge_step=again)

    def write(event: Event) -> None:
        if isinstance(event, Step):
            for name, value in (
                ("loss/current", event.loss),
                ("lr/unet", event.learning_rate),
                ("lr/textencoder", event.text_encoder_lr),
                ("grad_norm", event.grad_norm),
                *event.others.items(),
            ):
                writer.add_scalar(name, value, event.step)
        elif isinstance(event, Validated):
            writer.add_scalar("loss/validation", event.loss, event.step)

    try:
        yield write
    finally:
        writer.close()
