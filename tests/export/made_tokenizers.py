"""Tokenizers made here: one for every way of splitting text that llama.cpp knows, and others."""

from conftest import TEXT
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from puzzle.export import gguf_vocabulary
from puzzle.export.gguf_splitting import TEST_TEXT
from puzzle.model.modeling_puzzle import PuzzleConfig


def byte_level(*steps, regex=False):
    """A pre-tokenizer of `steps` and ByteLevel."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    return pre_tokenizers.Sequence([*steps, last])


def split(expression):
    """A step that isolates the matches of an expression."""
    return pre_tokenizers.Split(Regex(expression), "isolated")


# The expressions as the published tokenizer.json files have them
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA_3 = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
QWEN_2 = WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END
QWEN_35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + END
)
# llama.cpp's name -> pre-tokenizer, ignore_merges
PRE_TOKENIZERS = {
    "gpt-2": (byte_level(regex=True), False),
    "smollm": (byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True), False),
    "llama-bpe": (byte_level(split(LLAMA_3)), True),
    "dbrx": (byte_level(split(LLAMA_3)), False),
    "qwen2": (byte_level(split(QWEN_2)), False),
    "qwen35": (byte_level(split(QWEN_35)), False),
}
CORPUS = [
    TEXT,
    TEST_TEXT,
    "It's 12345 o'clock; WE'LL see 67 naïve cafés.\n\n\n  So    what?\t1,000,000.50",
] * 3


def train(folder, pre_tokenizer, ignore_merges=False, normalizer=None):
    """A byte-level BPE tokenizer in `folder` that splits with `pre_tokenizer`; 501 tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.save_pretrained(folder)
    return fast


def sentencepiece(folder, prepend):
    """A tokenizer like Llama 2's in `folder`.

    Every pair of pieces that makes a piece is a merge, best piece first. `prepend`: whether a space
    is put before a text.
    """
    letters = ["▁", *"abcdefghilnorstuvw().,:'"]
    words = ["▁a", "▁t", "he", "in", "re", "er", "▁the", "on", "▁th"]
    words += ["add", "ad", "dd", "▁add", "return", "ret", "urn", "ur"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    if prepend:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def vocabulary(folder, size=512):
    """The tokenizer in `folder` as GGUF has it, for an embedding of `size` rows."""
    return gguf_vocabulary.read(folder, PuzzleConfig(vocab_size=size, block_configs=[]))
