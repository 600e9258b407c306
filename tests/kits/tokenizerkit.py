"""Small tokenizers of the kinds that models have: SentencePiece's with byte fallback, WordPiece, Unigram, with gaps."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.text.codec import TextCodec

SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_like() -> TextCodec:
    """BPE with Metaspace by normaliser, byte fallback, and the decoder of Llama 2."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdehiknot.", "▁t", "he", "▁the", "▁c", "at", "▁cat"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "c"), ("a", "t"), ("▁c", "at")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special(backend)


def metaspace_bpe() -> TextCodec:
    """The same with Metaspace as pre-tokenizer and decoder."""
    codec = llama_like()
    codec.backend.normalizer = normalizers.Sequence([])
    codec.backend.pre_tokenizer = pre_tokenizers.Metaspace()
    codec.backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return codec


def unigram() -> TextCodec:
    """Unigram with Metaspace; the end of text is a piece of the vocabulary, as T5's is."""
    scored = [(piece, -3.0) for piece in (*SPECIAL, *"▁abcdehiknot.")] + [("▁the", -1.0), ("▁cat", -1.0)]
    backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _with_special(backend)


def word_piece() -> TextCodec:
    """WordPiece with the decoder of BERT."""
    pieces = [*SPECIAL, "the", "cat", "play", "##ing", "##s", *"abcdehiknot.", *(f"##{c}" for c in "abcdehiknot")]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return _with_special(backend)


def byte_level(vocab: dict[str, int] | None = None) -> TextCodec:
    """GPT-2's kind without merges: every byte a token. Ids as given, by default rising."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab=vocab or {c: i for i, c in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend)


def with_gaps() -> TextCodec:
    """251 tokens, the largest id 299: fewer than a byte counts, more than a byte holds."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 251 - len(SPECIAL)]
    vocab = {c: i for i, c in enumerate([*SPECIAL, *alphabet])}
    vocab[alphabet[-1]], vocab["a"] = vocab["a"], 299
    return byte_level(vocab)


def saved(codec: TextCodec, folder: Path) -> Path:
    """A folder that `load_tokenizer` reads: the tokenizer's file, and which tokens begin and end a text."""
    special = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=codec.backend, **special).save_pretrained(folder)
    return folder


def _with_special(backend: Tokenizer) -> TextCodec:
    backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in SPECIAL])
    return TextCodec(backend, bos_token_id=1, separator_token_id=2)
