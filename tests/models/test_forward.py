"""The forward pass in pieces is the model's, and text is put to it as the store's manifest says."""

from __future__ import annotations

import pytest
import torch
from modelkit import build_model, write_texts

from actstore.errors import InputError
from pipelines.causal.engine.language_model import LanguageModel, open_language_model
from pipelines.models.forward import embed, logits, run_blocks


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("causal")
    return open_language_model(str(build_model(folder / "model", write_texts(folder / "texts"))), "cpu")


def test_the_pieces_one_after_another_are_the_models_forward_pass(lm: LanguageModel) -> None:
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = lm.model(input_ids=ids, use_cache=False).logits
    half = run_blocks(lm.model, embed(lm.model, ids), 0, 2)
    torch.testing.assert_close(logits(lm.model, run_blocks(lm.model, half, 2)), expected, rtol=0, atol=1e-5)


def test_the_pieces_are_causal(lm: LanguageModel) -> None:
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 300
    before, after = (run_blocks(lm.model, embed(lm.model, which)) for which in (ids, changed))
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_prompt_begins_with_the_start_token_and_does_not_keep_it(lm: LanguageModel) -> None:
    prompt = lm.prompt("The fox went")
    assert prompt.ids[0] == lm.codec.bos_token_id
    assert "".join(prompt.texts[1:]) == "The fox went"
    assert prompt.kept.tolist() == [False] + [True] * (len(prompt) - 1)


def test_a_text_of_no_or_too_many_tokens_is_refused_with_both_numbers(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="has no token"):
        lm.prompt("")
    with pytest.raises(InputError, match=r"tokens with the start token, the model has 64 positions"):
        lm.prompt("fox " * 100)


def test_a_target_that_is_not_one_token_is_refused_with_its_tokens(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"is \d+ tokens here"):
        lm.token("The fox went")
