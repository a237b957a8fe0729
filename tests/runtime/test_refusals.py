"""What cannot be served is refused by name."""

import pytest
import torch

import dyvte
from dyvte.errors import ExitRuntimeError, NoVisualTokensError, UnsupportedBackboneError
from tests.helpers.batches import QUESTIONS, batch, llava
from tests.helpers.exits import oracle


def test_a_cache_taken_out_of_its_block_is_refused():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    with oracle([1, 4])(model):
        cache = model(**inputs).past_key_values
    with pytest.raises(ExitRuntimeError, match="inside `with exits"):
        model(input_ids=torch.full((2, 1), 9), past_key_values=cache)


def test_an_image_without_visual_tokens_is_refused():
    model, processor = llava()
    ids = processor.tokenizer("user what is it ? assistant", return_tensors="pt").input_ids
    pixels = batch(processor, QUESTIONS[:1])["pixel_values"]
    with dyvte.VisualExit.fixed(2)(model), pytest.raises((NoVisualTokensError, ValueError)) as error:
        model(input_ids=ids, pixel_values=pixels)
    # the model itself notices where its config names the token; where it does not, the runtime must
    exits = dyvte.VisualExit(fallback=2, visual_token_ids=(60,))
    with exits(model), pytest.raises(NoVisualTokensError, match="no visual token"):
        model(**batch(processor, QUESTIONS[:1]))
    assert "match" in str(error.value) or "visual" in str(error.value)


def test_masks_and_inputs_that_cannot_be_read_are_named():
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    with dyvte.VisualExit.fixed(2)(model):
        with pytest.raises(ExitRuntimeError, match="attention_mask has shape"):
            model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :-1]})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ExitRuntimeError, match="pass input_ids"):
            model(inputs_embeds=embeds)


@pytest.mark.parametrize("policy", ["exits", "never"])
def test_a_mask_of_four_dimensions_is_refused_where_tokens_leave(policy):
    # which tokens are padding could not be told from it once some have left
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:1])
    n = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    if policy == "never":
        stock = model(**inputs).logits
        with dyvte.VisualExit()(model):
            assert torch.equal(model(**inputs).logits, stock)
        return
    with dyvte.VisualExit.fixed(2)(model), pytest.raises(ExitRuntimeError, match="two-dimensional"):
        model(**inputs)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_mask_that_does_not_fit_the_cache_is_named_in_decoding(change):
    model, processor = llava()
    inputs = batch(processor, QUESTIONS[:2])
    length = inputs["input_ids"].shape[1] + 1
    step = {"input_ids": torch.full((2, 1), 9), "attention_mask": torch.ones(2, length + change)}
    with dyvte.VisualExit.fixed(2)(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(ExitRuntimeError, match=f"length {length + change}, expected {length}"):
            model(**step, past_key_values=cache)
        step["attention_mask"] = torch.ones(2, length)
        assert model(**step, past_key_values=cache).logits.isfinite().all()


def test_something_that_is_no_multimodal_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    with (
        pytest.raises(UnsupportedBackboneError, match="not a transformers model"),
        dyvte.VisualExit.fixed(1)(torch.nn.Linear(2, 2)),
    ):
        pass
    text = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
        )
    )
    with pytest.raises(UnsupportedBackboneError, match="no visual token"), dyvte.VisualExit.fixed(1)(text):
        pass
