"""The tokenizer built from open_clip's BPE table gives the same tokens as open_clip."""

import open_clip

from trainer.bases.clipbpe import END, START, clip_tokenizer

TEXTS = [
    "",
    "a photo of sks person, detailed face, 8k!!",
    "it's 10% off -- really?! (weird:1.3) <tag> [x]",
    "  spaces \t and\nlines  ",
    "Ünïcödé naïve café 東京 🙂",
    "supercalifragilisticexpialidocious 1234567890",
]


def test_every_word_has_open_clips_number():
    reference = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": START, "<end_of_text>": END}
    assert clip_tokenizer().get_vocab() == {names.get(word, word): n for word, n in reference.encoder.items()}


def test_texts_are_split_as_open_clip_splits_them():
    ours, reference = clip_tokenizer(), open_clip.tokenizer.SimpleTokenizer()
    for text in TEXTS:
        assert ours(text)["input_ids"][1:-1] == reference.encode(text.strip()), text
