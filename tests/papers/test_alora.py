"""aLoRA: an update that acts from the last invocation of a text on."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.errors import MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.invocation import since_last
from tests.train.small import tokenizer

from .. import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

INVOCATION = (5, 7)
IDS = torch.tensor([[1, 5, 7, 5, 2, 9], [3, 9, 0, 4, 38, 1], [5, 7, 3, 5, 7, 2]])  # once, never, twice
FIRST = [1, 6, 3]  # the first active position of each row
ACTIVE = torch.arange(6) >= torch.tensor(FIRST)[:, None]
BASES = ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen3ForCausalLM"]
METHOD = lorary.method("alora", invocation=INVOCATION, r=2, alpha=6.0)
PADDED = torch.tensor([[0, 0, 5, 7, 2, 9], [3, 9, 0, 4, 38, 1], [5, 7, 3, 5, 7, 2]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6])


def invoked(name: str = "LlamaForCausalLM", method: lorary.Method = METHOD, **changes: Any) -> Any:
    """A model with a trained adapter."""
    base = tiny.seeded(name, **changes)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "Mixtral" in name else None
    return tiny.trained(base, method, targets).eval()


def by_hand(name: str, model: Any, active: Tensor, **inputs: Any) -> Tensor:
    """The base's logits with s B A x added to the outputs of its layers at the active positions, by hooks."""
    base, layers = tiny.seeded(name), adapted_layers(model)
    for path, layer in layers.items():
        B, A = layer.factors()

        def add(module: Any, args: Any, y: Tensor, B: Tensor = B, A: Tensor = A, s: float = layer.scale) -> Tensor:
            return y + s * (args[0] @ A.T @ B.T) * active[..., None]

        base.get_submodule(path).register_forward_hook(add)
    return tiny.logits(base, **inputs)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_it_is_the_base_before_the_invocation_and_lora_from_it_on(name: str) -> None:
    model = invoked(name)
    found, base = tiny.logits(model, input_ids=IDS), tiny.logits(tiny.seeded(name), input_ids=IDS)
    torch.testing.assert_close(found, by_hand(name, model, ACTIVE, input_ids=IDS), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[~ACTIVE], base[~ACTIVE])
    assert ((found - base).abs().amax(-1) > 1e-2)[ACTIVE].all()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("checkpoint", [None, False, True], ids=["plain", "checkpoints", "reentrant checkpoints"])
def test_its_gradient_is_that_of_the_active_positions(name: str, checkpoint: bool | None) -> None:
    """Also of two forward passes before a backward pass, where PEFT refuses gradient checkpointing."""
    model = invoked(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpoint is not None:
        model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpoint})
    other = IDS.flip(1)
    (model(IDS, labels=IDS).loss + model(other, labels=other).loss).backward()
    found = {path: layer.params["A"].grad.clone() for path, layer in adapted_layers(model).items()}
    model.zero_grad()
    if checkpoint is not None:
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        disable()
        model.disable_input_require_grads()
    layers = adapted_layers(model)
    total = 0.0
    for ids in (IDS, other):
        mask = since_last(ids, INVOCATION, None, None)[..., None]
        handles = [
            layer.base.register_forward_hook(
                lambda m, args, y, layer=layer, mask=mask: (
                    y + layer.scale * (args[0] @ layer.params["A"].T @ layer.params["B"].T) * mask
                )
            )
            for layer in layers.values()
        ]
        with lorary.disabled(model):
            total = total + model(ids, labels=ids).loss
        for handle in handles:
            handle.remove()
    total.backward()  # type: ignore[attr-defined]
    for path, layer in layers.items():
        torch.testing.assert_close(layer.params["A"].grad, found[path], rtol=1e-4, atol=1e-6)


def test_rows_without_the_invocation_give_a_gradient_of_zero() -> None:
    model = invoked()
    model(IDS[1:2], labels=IDS[1:2]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


def test_where_the_invocation_is_found() -> None:
    def first(rows: list[list[int]], tokens: tuple[int, ...] = INVOCATION, **more: Any) -> list[list[int]]:
        found = since_last(torch.tensor(rows), tokens, more.get("real"), more.get("positions"))
        return found.int().tolist()

    assert first([[5, 7]]) == [[1, 1]]
    assert first([[5]]) == [[0]]
    assert first([[7, 5]]) == [[0, 0]]
    assert first([[5, 7, 1, 5, 7]]) == [[0, 0, 0, 1, 1]]
    assert first([[5, 5, 5]], (5, 5)) == [[0, 1, 1]]  # occurrences may overlap
    # padding that looks like the invocation is none
    padded = torch.tensor([[True, True, True, False, False]])
    assert first([[2, 3, 1, 2, 2]], (2,), real=padded) == [[1, 1, 1, 1, 1]]
    # two packed texts, of which each has its own; an invocation does not reach over their border
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    assert first([[5, 7, 1, 2, 5, 7, 1, 5]], positions=positions) == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert first([[1, 1, 5, 7, 1, 1, 1, 1]], positions=positions) == [[0] * 8]


def test_packed_texts_are_those_alone() -> None:
    model = invoked()
    one, two = torch.tensor([[1, 5, 7, 5]]), torch.tensor([[9, 4, 5, 7, 3]])
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    packed = tiny.logits(model, input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False)
    alone = [tiny.logits(model, input_ids=ids) for ids in (one, two)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


# --- caches and generation --------------------------------------------------------------------------------------------


def keys_values(cache: Any) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM"])
def test_keys_and_values_before_the_invocation_are_the_bases_bit_for_bit(name: str) -> None:
    with torch.no_grad():
        ours, base = (m(IDS, use_cache=True).past_key_values for m in (invoked(name), tiny.seeded(name)))
    for mine, theirs in zip(keys_values(ours), keys_values(base), strict=True):
        for row, first in enumerate(FIRST):
            assert torch.equal(mine[row, :, :first], theirs[row, :, :first])
        assert not torch.equal(mine[0, :, 1:], theirs[0, :, 1:])


def test_the_bases_cache_is_used_up_to_the_invocation() -> None:
    """A conversation that the base has read goes on with the adapter, and as if the adapter had read all of it."""
    model, base = invoked(), tiny.seeded("LlamaForCausalLM")
    talk, task = torch.tensor([[3, 9, 4, 1]]), torch.tensor([[5, 7, 8]])
    with torch.no_grad():
        cache = base(talk, use_cache=True).past_key_values
        disabled = copy.deepcopy(cache)
        with lorary.disabled(model):
            assert torch.equal(keys_values(model(talk, use_cache=True).past_key_values)[0], keys_values(cache)[0])
        found = model(task, past_key_values=cache).logits
    whole = tiny.logits(model, input_ids=torch.cat([talk, task], 1))
    torch.testing.assert_close(found, whole[:, 4:], rtol=1e-5, atol=1e-6)
    both = torch.cat([talk, task], 1)
    alone = model.generate(both, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(both, past_key_values=disabled, max_new_tokens=5, do_sample=False, pad_token_id=0), alone
    )


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generated_tokens_go_on_as_their_text(how: dict[str, Any]) -> None:
    model = invoked()
    asked = {"attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    found = model.generate(PADDED, **asked, **how)
    slow = PADDED if "num_beams" not in how else None
    mask = LEFT
    for _ in range(6 if slow is not None else 0):  # the whole text again for each token, where it has no new invocation
        out = by_hand("LlamaForCausalLM", model, active_of(slow, mask), input_ids=slow, attention_mask=mask)
        slow = torch.cat([slow, out[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    assert slow is None or torch.equal(found, slow)
    assert found.shape == (3, 12)


def active_of(ids: Tensor, mask: Tensor) -> Tensor:
    """The active positions of texts whose first six tokens are the prompt."""
    found = since_last(ids[:, :6], INVOCATION, mask[:, :6] != 0, None)
    return torch.cat([found, found[:, -1:].expand(-1, ids.shape[1] - 6)], 1)


def test_a_cache_that_is_passed_on_by_hand_stays_active() -> None:
    model = invoked()
    whole = tiny.logits(model, input_ids=IDS)
    with torch.no_grad():
        out = model(IDS[:, :5], use_cache=True)
        last = model(IDS[:, 5:], past_key_values=copy.deepcopy(out.past_key_values)).logits
    torch.testing.assert_close(last[:2], whole[:2, 5:], rtol=1e-5, atol=1e-6)


def test_threads_do_not_see_each_other() -> None:
    model, texts = invoked(), [IDS[i : i + 1].repeat(1, 30)[:, : 40 + i] for i in range(3)]
    expected = [tiny.logits(model, input_ids=text) for text in texts]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(10):
            if not torch.allclose(tiny.logits(model, input_ids=texts[i]), expected[i], atol=1e-6):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_compiles_whole() -> None:
    model = invoked()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(found, tiny.logits(model, input_ids=IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("rslora",), ("vera",), ("melora",), ("multilora",), ("adalora",), ("lora-fa",)])
def test_any_update_can_wait_for_an_invocation(names: tuple[str, ...]) -> None:
    options = {"target": 1} if "adalora" in names else {}
    model = invoked(method=lorary.method("alora", *names, invocation=INVOCATION, r=2, **options))
    found = tiny.logits(model, input_ids=IDS)
    torch.testing.assert_close(found, by_hand("LlamaForCausalLM", model, ACTIVE, input_ids=IDS), rtol=1e-5, atol=1e-6)


def test_detaching_gives_the_base_back() -> None:
    base = tiny.seeded("LlamaForCausalLM")
    before, plain = tiny.everything(base), tiny.logits(base, input_ids=IDS)
    tiny.trained(base, METHOD, None)
    with lorary.disabled(base):
        assert torch.equal(tiny.logits(base, input_ids=IDS), plain)
    assert tiny.everything(lorary.detach(base)) == before
    assert not base.model._forward_pre_hooks
    assert torch.equal(tiny.logits(base, input_ids=IDS), plain)


# --- files ------------------------------------------------------------------------------------------------------------


def theirs(name: str = "LlamaForCausalLM", **words: Any) -> Any:
    """A model with PEFT's aLoRA, trained."""
    targets = ["c_attn", "c_fc"] if "GPT2" in name else ["q_proj", "v_proj", "down_proj"]
    words = {"r": 3, "lora_alpha": 5, "target_modules": targets, "fan_in_fan_out": "GPT2" in name} | words
    config = LoraConfig(alora_invocation_tokens=list(INVOCATION), task_type="CAUSAL_LM", **words)
    return tiny.shaken(get_peft_model(tiny.seeded(name), config)).eval()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("words", [{}, {"use_rslora": True, "rank_pattern": {"q_proj|c_fc": 2}}], ids=str)
def test_pefts_files_both_ways(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    peft = theirs(name, **words)
    expected = tiny.logits(peft, input_ids=IDS)
    asked = {"input_ids": PADDED, "attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    answers = peft.generate(**asked)
    peft.save_pretrained(str(tmp_path / "peft"))
    model = lorary.load(tiny.seeded(name), tmp_path / "peft")
    torch.testing.assert_close(tiny.logits(model, input_ids=IDS), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(**asked), answers)
    lorary.save(model, tmp_path / "ours")
    export_peft(lorary.Adapter.of(model), tmp_path / "exported", folded=True)
    for folder in ("ours", "exported"):
        again = PeftModel.from_pretrained(tiny.seeded(name), str(tmp_path / folder)).eval()
        torch.testing.assert_close(tiny.logits(again, input_ids=IDS), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(again.generate(**asked), answers)
        own = lorary.load(tiny.seeded(name), tmp_path / folder)
        torch.testing.assert_close(tiny.logits(own, input_ids=IDS), expected, rtol=1e-5, atol=1e-5)


def test_adapters_change_places() -> None:
    """Another invocation, no adapter, a plain LoRA, and back."""
    model = invoked()
    first, expected = lorary.Adapter.of(model), tiny.logits(model, input_ids=IDS)
    other = lorary.Adapter.of(invoked(method=lorary.method("alora", invocation=(38,), r=2)))
    plain = lorary.Adapter.of(tiny.trained(tiny.seeded("LlamaForCausalLM"), tiny.LORA))
    lorary.switch(model, other)
    changed = tiny.logits(model, input_ids=IDS)
    base = tiny.logits(tiny.seeded("LlamaForCausalLM"), input_ids=IDS)
    assert [(changed[i] - base[i]).abs().max() > 1e-2 for i in range(3)] == [False, True, False]
    lorary.switch(model, plain)
    assert not model.model._forward_pre_hooks
    lorary.switch(model, first)
    assert torch.equal(tiny.logits(model, input_ids=IDS), expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_the_text_of_an_invocation_becomes_ids() -> None:
    method, words = lorary.method("alora", invocation="hello world", r=2), tokenizer()
    with pytest.raises(MethodError, match=r"'hello world', whose token ids are missing\n.*with_invocation"):
        lorary.attach(base := tiny.llama(vocab_size=len(words)), lorary.plan(base, method))
    found = lorary.with_invocation(method, words)
    assert found.context.tokens == tuple(words("hello world", add_special_tokens=False)["input_ids"])  # type: ignore
    assert lorary.with_invocation(found, None) is found
    assert lorary.with_invocation(tiny.LORA, None) is tiny.LORA
    with pytest.raises(MethodError, match="which has no tokens"):
        lorary.with_invocation(lorary.method("alora", invocation=" "), lambda text, **_: {"input_ids": []})


@pytest.mark.parametrize("wrong", [[], 5, [5, -1], [5, "a"], (True,), {5: 7}], ids=repr)
def test_invocations_that_are_none(wrong: Any) -> None:
    with pytest.raises(MethodError, match="it takes a text, or token ids"):
        lorary.method("alora", invocation=wrong)


@pytest.mark.parametrize(
    ("method", "targets", "sentence"),
    [
        (lorary.method("alora"), None, "has no invocation, from which on it could act"),
        (
            lorary.method("alora", invocation=(5, 40)),
            None,
            "token 40 of the invocation is outside the vocabulary of 40",
        ),
        (METHOD, ["embed_tokens", "q_proj"], "model.embed_tokens is of kind embedding: aLoRA adapts linear layers"),
        (METHOD, ["lm_head", "q_proj"], "lm_head is outside of the model's blocks, where positions are not those"),
    ],
)
def test_plans_that_are_refused(method: lorary.Method, targets: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        lorary.plan(tiny.llama(), method, targets)


def test_models_that_are_refused() -> None:
    with pytest.raises(PlanError, match="is not a Transformers model: only there an invocation is found"):
        lorary.plan(tiny.ConvNet(), METHOD, ["head"])
    with pytest.raises(PlanError, match="BertModel is not a causal language model"):
        lorary.plan(tiny.model("BertModel"), METHOD)
    with pytest.raises(PlanError, match="BartForConditionalGeneration is not a causal language model"):
        lorary.plan(tiny.model("BartForConditionalGeneration"), METHOD)
    with pytest.raises(PlanError, match="FromInvocation has no form for fused experts yet"):
        lorary.plan(tiny.model("MixtralForCausalLM"), METHOD, ["experts.down_proj"])


def test_calls_that_are_refused(tmp_path: Path) -> None:
    model = invoked()
    with pytest.raises(StateError, match="embeddings without the ids of their tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(StateError, match="is called outside of the model's forward pass"):
        layer(torch.zeros(1, 3, 16))
    with pytest.raises(StateError, match="gets no keyword arguments from the model's forward pass"):
        model.model.layers[0](torch.zeros(1, 3, 16))
    with pytest.raises(StateError, match="acts on the tokens from the invocation on alone, which no weight and bias"):
        lorary.merge(model)
    with pytest.raises(MethodError, match=r"no low-rank form:(?s:.*)acts on the tokens from the invocation on alone"):
        lorary.Adapter.of(model).low_rank()
    assert tiny.logits(model, input_ids=IDS) is not None
    vera = invoked(method=lorary.method("alora", "vera", invocation=INVOCATION, r=2))
    with pytest.raises(lorary.errors.FileError, match="acts on the tokens from the invocation on alone"):
        export_peft(lorary.Adapter.of(vera), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_methods_that_move_the_base_are_refused() -> None:
    with pytest.raises(MethodError, match="SVDInit moves part of W into B A, and FromInvocation adds B A to a part"):
        lorary.method("alora", "pissa", invocation=INVOCATION)
    with pytest.raises(MethodError, match="alora and dora both choose how the update joins the weight"):
        lorary.method("alora", "dora", invocation=INVOCATION)


def test_a_model_in_which_peft_finds_no_invocation(tmp_path: Path) -> None:
    """PEFT's class for a classifier never looks for it: not in PEFT's files, and refused in them."""
    model = tiny.trained(tiny.seeded("LlamaForSequenceClassification", pad_token_id=0), METHOD, None).eval()
    lorary.save(model, tmp_path / "own")
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    again = lorary.load(tiny.seeded("LlamaForSequenceClassification", pad_token_id=0), tmp_path / "own")
    assert torch.equal(tiny.logits(again, input_ids=IDS), tiny.logits(model, input_ids=IDS))
    theirs().save_pretrained(str(tmp_path / "peft"))
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"CAUSAL_LM"', '"SEQ_CLS"'))
    with pytest.raises(lorary.errors.FileError, match="task_type is 'SEQ_CLS': PEFT looks for it only under CAUSAL_LM"):
        lorary.load(tiny.llama(), tmp_path / "peft")
    config.write_text(config.read_text().replace('"SEQ_CLS"', '"CAUSAL_LM"').replace("5,\n    7", ""))
    with pytest.raises(lorary.errors.FileError, match="alora_invocation_tokens: names no token"):
        lorary.load(tiny.llama(), tmp_path / "peft")
