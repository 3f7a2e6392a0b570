import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmpo_lightning import Task
from dmpo_lightning.data.demonstrations import DemonstrationsDataModule
from dmpo_lightning.data.tokens import text_ids, tokenize_prompt
from dmpo_lightning.models.illada import ILLaDAConfig, ILLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_model, load_tokenizer, token_facts
from dmpo_lightning.models.lora import LoRA, load_adapter
from helpers import NEVER_SAMPLED, tiny_policy
from published import ILLADA
from small_models import SMALL, random_ids, tiny_illada, word_tokenizer

# Shapes and names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions"),
        ({"rope_scaling": {"factor": 2.0}}, "scaled rotary positions"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}}, "scaled rotary positions"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "scaled rotary positions"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"head_dim": 7}, "`head_dim`.*heads of 7"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        ILLaDAConfig(**changes)


def test_a_head_is_tied_unless_the_folder_says_otherwise(tmp_path):
    """transformers leaves values out of config.json that are its own defaults and the model's, as this one is."""
    model = tiny_illada()
    model.save_pretrained(tmp_path)
    config = {key: value for key, value in (ILLADA | SMALL).items() if key != "tie_word_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("where", ["rope_theta", "rope_parameters"])
def test_rotary_base_and_epsilon_are_those_of_the_folder(tmp_path, where):
    """As the published code wrote them, and as transformers 5 does."""
    model, ids = tiny_illada().eval(), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    config = {key: value for key, value in (ILLADA | SMALL).items() if key != "rope_theta"}
    named = {"rope_theta": 7000.0} if where == "rope_theta" else {"rope_parameters": {"rope_theta": 7000.0}}
    (tmp_path / "config.json").write_text(json.dumps(config | named | {"rms_norm_eps": 1e-3, "torch_dtype": "float32"}))
    torch.testing.assert_close(load_model(str(tmp_path))(ids).logits, model(ids).logits, atol=0, rtol=0)


# Equality with transformers' Llama ------------------------------------------------------------------------------------


def llama_logits(model: ILLaDAForMaskedDiffusion, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Those of transformers' Llama with the weights of ``model``, whose names are the same, under a full mask."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in SMALL},
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    )
    llama.load_state_dict(model.state_dict())
    rows, length = ids.shape
    bias = torch.zeros(rows, 1, length, length).masked_fill(~attended[:, None, None], torch.finfo(torch.float32).min)
    # Columns are positions, as in the published code, whatever is padding.
    return llama.eval()(ids, attention_mask=bias, position_ids=torch.arange(length)[None], use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 3, 8]])
def test_logits_equal_those_of_a_llama_that_sees_all(padding):
    model, ids = tiny_illada().eval(), random_ids(3, 19)
    attended = torch.arange(19) >= torch.tensor(padding)[:, None]
    expected = llama_logits(model, ids, attended)
    # Positions count from the first token here, and from the first column there, which rounds differently.
    torch.testing.assert_close(model(ids, attended).logits[attended], expected[attended], atol=2e-5, rtol=1e-5)


# Saving, loading, adapters --------------------------------------------------------------------------------------------


def test_a_head_that_the_configuration_unties_must_be_there(tmp_path):
    tiny_illada().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ILLADA | SMALL | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"'lm_head.weight' is missing"):
        load_model(str(tmp_path))


def test_a_stored_head_that_differs_from_the_embedding_that_it_is_tied_to_is_an_error(tmp_path):
    model = tiny_illada(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ILLADA | SMALL))
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load_model(str(tmp_path))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ILLADA | SMALL))
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_head_that_is_the_embedding_is_not_adapted(tmp_path):
    """Merged, the adapter would change the embedding as well."""
    with pytest.raises(ValueError, match=r"cannot adapt 'lm_head' of ILLaDAForMaskedDiffusion"):
        LoRA(r=2, targets=["q_proj", "lm_head"]).apply(tiny_illada())
    untied = LoRA(r=2, targets=["q_proj", "lm_head"]).apply(tiny_illada(tie_word_embeddings=False))
    untied.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot adapt 'lm_head' of ILLaDAForMaskedDiffusion"):
        load_adapter(tiny_illada(), str(tmp_path))


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def illada_tokenizer() -> PreTrainedTokenizerFast:
    """Ids as published: bos 0, pad 1, eos 2, unknown 3, mask 5, and no token is declared as the mask."""
    words = ("<bos>", "<pad>", "<eos>", "<unk>", "<sep>", "<[MASK]>", "2", "+", "<", ">", "[", "]", "MASK")
    special = {"bos_token": "<bos>", "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(words, **special)
    tokenizer.add_tokens(["<[MASK]>"])
    return tokenizer


def test_mask_end_and_padding_are_the_published_ids(illada_tokenizer):
    facts = token_facts(tiny_illada(), illada_tokenizer)
    assert (facts.mask_token_id, facts.end_token_ids, facts.pad_token_id) == (5, (2,), 1)


def test_a_prompt_that_spells_the_mask_holds_none(illada_tokenizer):
    """Read as the token, it would be denoised as if it were part of the completion."""
    assert illada_tokenizer("2 <[MASK]> 2", add_special_tokens=False)["input_ids"] == [6, 5, 6]
    assert 5 not in tokenize_prompt(illada_tokenizer, "2 <[MASK]> 2")
    assert 5 not in text_ids(illada_tokenizer, "<[MASK]>")


def test_a_tokenizer_with_code_of_its_own_loads_without_it(illada_tokenizer, tmp_path):
    illada_tokenizer.save_pretrained(tmp_path)
    tiny_illada().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    names = {
        "tokenizer_class": "ILLaDATokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization.ILLaDATokenizer", None]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert tokenize_prompt(load_tokenizer(str(tmp_path)), "2 + 2") == [6, 7, 6]


def test_a_mask_token_more_makes_no_illada_of_a_tokenizer_of_another_family(tmp_path):
    words = word_tokenizer(("<|endoftext|>", "<|im_end|>", "<[MASK]>", "2"), unk_token="2", eos_token="<|endoftext|>")
    words.save_pretrained(tmp_path)
    assert token_facts(tiny_illada(), load_tokenizer(str(tmp_path))).end_token_ids == (0, 1)


def test_a_base_tokenizer_has_no_template_and_takes_plain_prompts(illada_tokenizer, tmp_path):
    illada_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template is None
    assert tokenize_prompt(loaded, "2 + 2") == [6, 7, 6]
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_prompt(loaded, [{"role": "user", "content": "2 + 2"}])


def test_an_instruct_tokenizer_keeps_its_own_template(illada_tokenizer, tmp_path):
    illada_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
    illada_tokenizer.save_pretrained(tmp_path)
    assert tokenize_prompt(load_tokenizer(str(tmp_path)), "2 + 2") == [6, 7, 6, 2]


def test_a_demonstration_ends_its_turn_with_the_end_of_text(illada_tokenizer):
    class Sums(Task):
        accuracy = "correct"

        def examples(self, split):
            return [{"completion": "2"}]

        def prompt(self, example):
            return "2 +"

        def score(self, example, completion):
            return {"correct": 0.0}

    made = DemonstrationsDataModule(Sums(), tokenizer=illada_tokenizer, completion_length=4, batch_size=1)
    made.setup("fit")
    (batch,) = made.val_dataloader()
    assert batch.completion_ids.tolist() == [[6, 2, 2, 2]]


# Behind the policy ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_log_probs_of_a_completion_are_those_of_its_own_positions():
    model = tiny_illada().eval()
    policy, prompt, completion = tiny_policy(model=model), random_ids(2, 3), torch.tensor([[6, 9, 20], [24, 8, 7]])
    masks = torch.tensor([[[True, False, True]], [[True, True, False]]])
    noisy = torch.cat((prompt, torch.where(masks[:, 0], 5, completion)), dim=1)
    logits = llama_logits(model, noisy, torch.ones_like(noisy, dtype=torch.bool))[:, 3:]
    logits[..., list(NEVER_SAMPLED)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0] * masks[:, 0]
    found = policy.completion_log_probs(prompt, torch.ones(2, 3, dtype=torch.bool), completion, masks)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)
