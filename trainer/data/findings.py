"""What is wrong with a dataset, and what to do about it: rules from a survey to findings.

Pure: no files, no terminal.  ``trainer.data.survey`` reads the folder. Training refuses ``REFUSED`` findings;
a ``warning`` costs quality; a ``note`` is worth knowing.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.bases import FAMILIES
from trainer.config import TOKEN_LENGTHS, TrainConfig
from trainer.data.buckets import BucketRules
from trainer.data.captions import CaptionFiles, shown
from trainer.data.dataset import MIN_REFERENCES, references_apart
from trainer.data.survey import Photo, Survey

REFUSED, WARNING, NOTE = "refused", "warning", "note"
SHORT_SHARE = 0.3  # of the images below the family's short_side_px: more of them are worth a warning
NEAR_BITS = (
    20  # of 256; assumed: a JPEG and a smaller copy stay below it (tests/unit/hpo/cli/test_dataset_check.py)
)
NEAR_LEVELS = 6.0  # of 255, mean over the thumbnail
BUCKET_SLACK = 1.06  # buckets of up to 3:1 have 0.91 to 1 of the resolution's area; a side is its root
# Left out of the words that could be a trigger.
_COMMON = frozenset({
    "a", "an", "and", "are", "at", "by", "drawing", "for", "from", "her", "his", "image", "in", "is", "its", "of",
    "on", "or", "photo", "picture", "the", "to", "with",
})  # fmt: skip
SAME_SHARE = 0.4  # assumed: of the captions; so many equal ones are a habit or a tool's, not chance
MIN_CAPTIONS = 4  # assumed: in fewer, every tag is in all of them by chance
_ODD_MODES = {
    "CMYK": (WARNING, "CMYK", "converted without a colour profile: save them as sRGB if colours look off"),
    "YCCK": (WARNING, "CMYK", "converted without a colour profile: save them as sRGB if colours look off"),
    "LAB": (WARNING, "Lab", "converted without a colour profile: save them as sRGB if colours look off"),
    "P": (NOTE, "palette", "read as RGB; an image with few colours may have lost detail"),
    "PA": (NOTE, "palette", "read as RGB; an image with few colours may have lost detail"),
    "1": (WARNING, "black and white", "leave them out unless the subject is so"),
    "L": (NOTE, "grey", "read as RGB; say so in the caption (greyscale), or leave them out"),
    "LA": (NOTE, "grey", "read as RGB; say so in the caption (greyscale), or leave them out"),
    "I": (NOTE, "16-bit", "shortened to 8 bits; nothing to do if they look right"),
    "F": (WARNING, "floating-point", "save them as 8-bit RGB"),
}


@dataclass(frozen=True)
class DatasetFinding:
    """One finding: what was found, in which files, and what to do."""

    kind: str
    severity: str
    what: str
    do: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What a dataset is checked for.  ``count_tokens`` is the base's tokenizer."""

    family: str
    config: TrainConfig
    count_tokens: Callable[[str], int]
    trigger: str | None = None
    class_word: str | None = None


Rule = Callable[[Survey, Question], Iterator[DatasetFinding]]


def findings(survey: Survey, question: Question) -> tuple[DatasetFinding, ...]:
    """Everything that the rules find, what training refuses first."""
    found = [finding for rule in RULES for finding in rule(survey, question)]
    order = (REFUSED, WARNING, NOTE)
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def _files(paths: Iterable[Path | Photo]) -> tuple[str, ...]:
    return tuple(shown(path.path if isinstance(path, Photo) else path) for path in paths)


def _count(items: Sequence[object], noun: str, nouns: str = "") -> str:
    return f"{len(items)} {noun if len(items) == 1 else nouns or noun + 's'}"


# Images


def _broken(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    for broken in survey.broken:
        what = broken.error.message.replace(shown(broken.path), shown(broken.path.name))
        yield DatasetFinding("corrupt", REFUSED, what, broken.error.hint, _files([broken.path]))


def _other_formats(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    if survey.other:
        endings = ", ".join(sorted({path.suffix.lower() for path in survey.other}))
        what = f"{_count(survey.other, 'picture')} of a format that is not read ({endings})"
        yield DatasetFinding("format", WARNING, what, "convert them to PNG or JPEG", _files(survey.other))


def _size(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    """Too small for a bucket, enlarged or trained small, and SDXL's short sides."""
    config = question.config
    rules = BucketRules.of(config)
    unfit = [p for p in survey.trained if rules.fit(p.width_px, p.height_px) is None]
    if unfit:
        what = f"{_count(unfit, 'image')} too small or narrow for any bucket"
        yield DatasetFinding("unfit", REFUSED, what, "remove them or use larger versions", _files(unfit))
    small = [p for p in survey.trained if p not in unfit and _is_small(p, config)]
    half = [p for p in small if _enlargement(p, config) >= 2]
    if half:
        what = f"{_count(half, 'image')} less than half as large as {config.resolution}² px"
        do = "find larger versions or leave them out: detail that is not there cannot be learnt"
        yield DatasetFinding("small", WARNING, what, do, _files(half))
    rest = [p for p in small if p not in half]
    if rest:
        what = f"{_count(rest, 'image')} smaller than {config.resolution}² px: "
        if config.enable_bucket and config.bucket_no_upscale:
            what += "trained at their own size"
            do = "use larger versions if you have them; they are not enlarged (bucket_no_upscale)"
        else:
            largest = max(_enlargement(photo, config) for photo in rest)
            what += f"enlarged up to {largest:.1f} times"
            do = "use larger versions, or set bucket_no_upscale = true to train them at their own size"
        yield DatasetFinding("upscaled", WARNING, what, do, _files(rest))
    facts = FAMILIES[question.family]
    short_px = facts.short_side_px
    short = [p for p in survey.trained if short_px and p.short_px < short_px]
    if (
        short_px is not None
        and config.resolution >= facts.resolution_px
        and len(short) > SHORT_SHARE * len(survey.trained)
    ):
        share = len(short) / len(survey.trained)
        what = f"{share:.0%} of the images have a side below {short_px} px; "
        what += f"{facts.title} wants {facts.resolution_px} px and more"
        do = f"collect larger images until fewer than {SHORT_SHARE:.0%} are this small, or train SD1.5"
        yield DatasetFinding("short-side", WARNING, what, do, _files(short))


def _is_small(photo: Photo, config: TrainConfig) -> bool:
    keeps_size = config.enable_bucket and config.bucket_no_upscale
    return _enlargement(photo, config) > (BUCKET_SLACK if keeps_size else 1)


def _enlargement(photo: Photo, config: TrainConfig) -> float:
    """By how much an image is enlarged – or would have to be, where bucket_no_upscale keeps it small."""
    if config.enable_bucket and config.bucket_no_upscale:
        return math.sqrt(math.prod(config.size_px) / (photo.width_px * photo.height_px))
    fit = BucketRules.of(config).fit(photo.width_px, photo.height_px)
    assert fit is not None, "only bucket_no_upscale leaves images without a bucket"
    return fit.resized_width_px / photo.width_px


def _few(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    """Too few images for a search to set some apart."""
    images = len({photo.sha256 for photo in survey.trained})
    apart = len(survey.held_out) or references_apart(images)
    if images and apart < MIN_REFERENCES:
        what = (
            f"{_count(range(images), 'image')}: too few for hpo search to hold out {MIN_REFERENCES} of them"
        )
        do = "add images, put some into held_out/ (hpo dataset prepare --held-out 2), or search with --references"
        yield DatasetFinding("few", NOTE, what, do)


def _modes(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    groups: dict[tuple[str, str, str], list[Photo]] = defaultdict(list)
    for photo in survey.trained:
        mode = "I" if photo.mode.startswith("I") else photo.mode
        if mode in _ODD_MODES:
            groups[_ODD_MODES[mode]].append(photo)
        if photo.has_alpha and not question.config.alpha_mask:
            do = "fill the background yourself, or set alpha_mask = true to leave it out of the loss"
            groups[(NOTE, "partly transparent: white is put behind", do)].append(photo)
        if photo.is_turned:
            do = "nothing: they are turned upright by their EXIF mark"
            groups[(NOTE, "stored on their side", do)].append(photo)
        if photo.frames > 1:
            do = "only the first frame is used: save the frames you want as images"
            groups[(NOTE, "animated", do)].append(photo)
    for (severity, name, do), photos in groups.items():
        yield DatasetFinding("mode", severity, f"{_count(photos, 'image')}: {name}", do, _files(photos))


def _duplicates(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    same: dict[str, list[Photo]] = defaultdict(list)
    for photo in survey.trained:
        same[photo.sha256].append(photo)
    for photos in same.values():
        if len(photos) > 1:
            what = f"{len(photos)} files are the same image"
            do = "keep one; to show it more often, give it a folder with more repeats"
            yield DatasetFinding("duplicate", WARNING, what, do, _files(photos))
    distinct = [photos[0] for photos in same.values()]
    for group in near_groups(distinct):
        what = f"{len(group)} images look the same"
        do = "keep the best one: near copies make the LoRA repeat this image"
        yield DatasetFinding("near-duplicate", WARNING, what, do, _files(group))
    trained = same.keys()
    leaked = [photo for photo in survey.held_out if photo.sha256 in trained]
    if leaked:
        what = f"{_count(leaked, 'image')}  in held_out/ also among the training images"
        do = "remove them from one place: held-out images must be new to the result"
        yield DatasetFinding("held-out", REFUSED, what, do, _files(leaked))
    fresh = [photo for photo in survey.held_out if photo.sha256 not in trained]
    close = [photo for photo in fresh if any(are_near(photo, other) for other in distinct)]
    if close:
        what = f"{_count(close, 'image')}  in held_out/ almost the same as a training image"
        do = "replace them: the result would look better than it is"
        yield DatasetFinding("held-out", WARNING, what, do, _files(close))


def are_near(first: Photo, second: Photo) -> bool:
    """Whether two images are one picture in another size, quality or format."""
    bits = np.count_nonzero(first.look.bits != second.look.bits)
    return bool(bits <= NEAR_BITS and np.abs(first.look.thumb - second.look.thumb).mean() <= NEAR_LEVELS)


def near_groups(photos: Sequence[Photo]) -> list[list[Photo]]:
    """Images that are near to the first of their group."""
    if len(photos) < 2:
        return []
    bits = np.packbits(np.stack([photo.look.bits for photo in photos]), axis=1)
    groups, taken = [], set()
    for index in range(len(photos)):
        if index in taken:
            continue
        distances = np.bitwise_count(bits[index + 1 :] ^ bits[index]).sum(axis=1)
        likely = [index + 1 + int(place) for place in np.flatnonzero(distances <= NEAR_BITS)]
        near = [place for place in likely if place not in taken and are_near(photos[index], photos[place])]
        if near:
            taken.update(near)
            groups.append([photos[index], *(photos[place] for place in near)])
    return groups


# Captions


def _caption_files(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    extension = question.config.caption_extension
    if survey.uncaptioned:
        what = f"{_count(survey.uncaptioned, 'image')} without a caption ({extension})"
        do = f"put a {extension} file of the same name beside each, or copy the folder with hpo dataset prepare, "
        do += "which writes trigger and class word"
        others = [e for e in (".txt", ".caption") if e != extension]
        files = CaptionFiles()
        found = [e for e in others if any(files.find(p, e) for p in survey.uncaptioned)]
        if found:
            do = f'there are {found[0]} files: set caption_extension = "{found[0]}"'
        yield DatasetFinding("caption-missing", REFUSED, what, do, _files(survey.uncaptioned))
    if survey.named:
        what = f"{_count(survey.named, 'image')} without a caption ({extension})"
        do = (
            "the words of the folder's name are used, as in sd-scripts: write captions to describe each image"
        )
        yield DatasetFinding("caption-of-folder", WARNING, what, do, _files(survey.named))
    if survey.empty_captions:
        what = f"{_count(survey.empty_captions, 'caption')} empty"
        yield DatasetFinding(
            "caption-empty", REFUSED, what, "write what the images show", _files(survey.empty_captions)
        )
    for broken in survey.broken_captions:
        yield DatasetFinding(
            "caption-broken", REFUSED, broken.error.message, broken.error.hint, _files([broken.path])
        )
    if survey.orphans:
        what = f"{_count(survey.orphans, 'caption')} without an image"
        yield DatasetFinding(
            "orphan", NOTE, what, "remove or rename: they are not used", _files(survey.orphans)
        )
    stems = Counter(photo.path.with_suffix("") for photo in survey.trained)
    shared = [
        photo
        for photo in survey.trained
        if stems[photo.path.with_suffix("")] > 1
        and not photo.path.with_name(photo.path.name + extension).is_file()
    ]
    if len(shared) > 1:
        what = f"{len(shared)} images share a caption file with another of the same name"
        yield DatasetFinding(
            "shared-caption", WARNING, what, "rename one of each, with its caption", _files(shared)
        )


def _length(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    limit = question.config.max_token_length or TOKEN_LENGTHS[0]
    counts = {p: question.count_tokens(p.caption) for p in survey.trained if p.caption}
    beyond = [photo for photo, count in counts.items() if count > TOKEN_LENGTHS[-1]]
    cut = [photo for photo, count in counts.items() if limit < count <= TOKEN_LENGTHS[-1]]
    if beyond:
        what = f"{_count(beyond, 'caption')} longer than {TOKEN_LENGTHS[-1]} tokens, the most that is read"
        yield DatasetFinding(
            "caption-long", WARNING, what, "shorten them: the rest is never read", _files(beyond)
        )
    if cut:
        longest = max(counts[photo] for photo in cut)
        enough = next(length for length in TOKEN_LENGTHS if length >= longest)
        what = f"{_count(cut, 'caption')} longer than {limit} tokens (up to {longest}): the rest is not read"
        do = f"set max_token_length = {enough}, or shorten them"
        yield DatasetFinding("caption-long", WARNING, what, do, _files(cut))


def _words(survey: Survey, question: Question) -> Iterator[DatasetFinding]:
    """The trigger, and tags that are everywhere."""
    config, trigger = question.config, question.trigger
    captioned = [photo for photo in survey.trained if photo.caption]
    if survey.trained and (trigger is None or question.class_word is None):
        yield _unnamed(question, [photo.caption or "" for photo in captioned])
    if not captioned:
        return
    if trigger is not None:
        frame = f"{config.caption_prefix} {config.caption_suffix}"
        without = [p for p in captioned if not _says(f"{frame} {p.caption}", trigger)]
        if without:
            what = f"{len(without)} of {len(captioned)} captions without the trigger word {shown(trigger)!r}"
            do = "put it first in each caption, or set caption_prefix to it"
            yield DatasetFinding("trigger", WARNING, what, do, _files(without))
    if len(captioned) < MIN_CAPTIONS:
        return
    ((text, count),) = Counter(photo.caption or "" for photo in captioned).most_common(1)
    if count >= max(MIN_CAPTIONS, SAME_SHARE * len(captioned)):
        what = f"{count} of {len(captioned)} captions are the same: {shown(text)[:60]!r}"
        do = "describe what differs between the images: what no caption names is learned as part of the subject"
        yield DatasetFinding("caption-same", NOTE, what, do)
        return
    tags = Counter(tag for p in captioned for tag in set(_tags(p.caption or "", config.caption_separator)))
    meant = [word.lower() for word in (trigger, question.class_word) if word]
    everywhere = [
        tag
        for tag, count in tags.items()
        if count == len(captioned) and not any(_says(tag, w) for w in meant)
    ]
    if everywhere and trigger is not None:  # without a trigger, the note about it names them
        what = "in every caption: " + ", ".join(shown(tag)[:40] for tag in sorted(everywhere)[:8])
        do = "remove a tag that is the subject itself; else it works like a second trigger"
        yield DatasetFinding("tag-everywhere", NOTE, what, do)


def _unnamed(question: Question, captions: Sequence[str]) -> DatasetFinding:
    """The note that trigger or class word are not known, with words that could be the trigger."""
    missing = {"--trigger": question.trigger, "--class": question.class_word}
    flags = [flag for flag, word in missing.items() if word is None]
    names = [
        {"--trigger": "trigger word", "--class": "class word (girl, man, vase, style)"}[f] for f in flags
    ]
    what = f"no {' and no '.join(names)} is known"
    words = words_everywhere(captions) if question.trigger is None else []
    if words:
        what += f"; in every caption: {', '.join(shown(word)[:40] for word in words[:8])}"
    do = f"name the folder like 10_trigger class, or give {' and '.join(flags)}: prompts are made from them"
    return DatasetFinding("trigger" if "--trigger" in flags else "class", NOTE, what, do)


def words_everywhere(captions: Sequence[str]) -> list[str]:
    """Words that are in every caption, in the order of the first one; common English words are left out.

    Empty for fewer than MIN_CAPTIONS captions: any word could be in all of them.
    """
    if len(captions) < MIN_CAPTIONS:
        return []
    found = [re.findall(r"[^\W_][\w-]*", caption.lower()) for caption in captions]
    shared = set(found[0]).intersection(*found[1:])
    return [word for word in dict.fromkeys(found[0]) if word in shared and word not in _COMMON]


def _says(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()) is not None


def _tags(caption: str, separator: str) -> list[str]:
    return [tag for part in caption.lower().split(separator) if (tag := part.strip())]


RULES: tuple[Rule, ...] = (
    _broken,
    _caption_files,
    _size,
    _other_formats,
    _duplicates,
    _length,
    _words,
    _few,
    _modes,
)
